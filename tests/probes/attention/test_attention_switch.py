"""The use of transformers' attention settings, so that a new transformers breaks here first."""

import copy
import importlib.util

import torch
from transformers import AttentionInterface

from probes import TokenMap, record_attention
from probes.attention import attention_switch
from probes.attention.attention_switch import SWITCHED, AttentionSwitch, is_switched


def test_attention_switch_redirects_modules_to_function_and_restores_them(make_llava, make_inputs):
    model, inputs = make_llava(), make_inputs()
    first, *others = [layer.self_attn for layer in model.get_decoder().layers]
    own_config, settings = first.config, copy.deepcopy(first.config.to_dict())
    with torch.no_grad():
        expected = model(**inputs).logits
        calls = []

        def double(module, query, key, value, mask, **options):
            calls.append(module)
            assert module.config._attn_implementation == SWITCHED
            output = switch.call_own(module, AttentionInterface()["sdpa"], query, key, value, mask, **options)
            return 2 * output[0], output[1]

        switch = AttentionSwitch([first], double)
        assert is_switched(first)
        assert not any(map(is_switched, others))
        doubled = model(**inputs).logits
        switch.restore()
        assert calls == [first]
        assert not torch.equal(doubled, expected)
        assert first.config is own_config
        assert first.config.to_dict() == settings
        assert torch.equal(model(**inputs).logits, expected)


def test_attention_switch_dispatches_two_models_separately(make_llava, make_inputs):
    """One registered name serves both: calls are dispatched by module."""
    models, inputs, called = [make_llava(seed=0), make_llava(seed=1)], make_inputs(), []

    def recording(name):
        def attend(module, query, key, value, mask, **options):
            called.append(name)
            return AttentionInterface()["sdpa"](module, query, key, value, mask, **options)

        return attend

    switches = [
        AttentionSwitch([layer.self_attn for layer in model.get_decoder().layers], recording(number))
        for number, model in enumerate(models)
    ]
    with torch.no_grad():
        models[1](**inputs)
        models[0](**inputs)
    for switch in switches:
        switch.restore()
    assert called == [1, 1, 1, 0, 0, 0]


def test_attention_switch_second_import_keeps_redirected_modules(make_llava, make_inputs):
    """A second import registers its dispatcher while a model is recorded through the first."""
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad():
        with record_attention(model, tokens) as expected:
            model(**inputs)
        with record_attention(model, tokens) as actual:
            spec = importlib.util.spec_from_file_location("second_import", attention_switch.__file__)
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
            model(**inputs)
    torch.testing.assert_close(actual.received, expected.received, rtol=0, atol=0, equal_nan=True)
