"""`record_attention` changes only the model it was opened on, and only while it is open."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlavaForConditionalGeneration

from probes import TokenMap
from probes.attention.recording import record_attention

Model = LlavaForConditionalGeneration
Inputs = dict[str, torch.Tensor]


@pytest.fixture
def inputs(make_inputs: Callable[..., Inputs]) -> Inputs:
    return make_inputs()


def state_of(model: Model) -> Any:
    """Return everything that recording could leave behind."""
    return (
        dict(AttentionInterface._global_mapping),
        dict(AttentionMaskInterface._global_mapping),
        [id(getattr(module, "config", None)) for module in model.modules()],
        [str(module.config) for module in model.modules() if hasattr(module, "config")],
        [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")],
        [(dict(module._forward_pre_hooks), dict(module._forward_hooks)) for module in model.modules()],
    )


def test_record_attention_restores_model_and_registries(make_llava: Callable[..., Model], inputs: Inputs) -> None:
    model = make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad():
        model(**inputs)  # transformers adds hooks of its own in the first call
        before = state_of(model)
        with record_attention(model, tokens):
            model(**inputs)
        assert state_of(model) == before
        with pytest.raises(KeyError, match="from inside"), record_attention(model, tokens):
            raise KeyError("from inside")
        assert state_of(model) == before
        with pytest.raises(ValueError, match="was called"), record_attention(model, tokens):
            model(input_ids=inputs["input_ids"][:2], attention_mask=inputs["attention_mask"][:2])
        assert state_of(model) == before


def test_record_attention_switches_only_recorded_layers(make_llava: Callable[..., Model], inputs: Inputs) -> None:
    """The configs that masks, caches and the vision tower depend on stay unchanged."""
    model = make_llava()
    with record_attention(model, TokenMap.from_inputs(model, inputs), layers=[1]):
        names = [layer.self_attn.config._attn_implementation for layer in model.get_decoder().layers]
        assert [name == "sdpa" for name in names] == [True, False, True]
        assert model.config._attn_implementation == "sdpa"
        assert model.get_decoder().config._attn_implementation == "sdpa"
        assert all(layer.self_attn.config._attn_implementation == "sdpa" for layer in vision_layers(model))


def vision_layers(model: Model) -> Any:
    return [module for module in model.model.vision_tower.modules() if hasattr(module, "self_attn")]


def test_record_attention_leaves_other_model_of_same_class_unchanged(
    make_llava: Callable[..., Model], inputs: Inputs
) -> None:
    recorded, other = make_llava(), make_llava(seed=1)
    tokens = TokenMap.from_inputs(recorded, inputs)
    with torch.no_grad():
        before = other(**inputs).logits
        with record_attention(recorded, tokens) as attention:
            assert torch.equal(other(**inputs).logits, before)
            with pytest.raises(RuntimeError, match="nothing was recorded"):
                _ = attention.mass


def test_record_attention_nested_on_two_models_records_each(make_llava: Callable[..., Model], inputs: Inputs) -> None:
    models = [make_llava(seed=seed) for seed in (0, 1)]
    tokens = TokenMap.from_inputs(models[0], inputs)
    alone = []
    with torch.no_grad():
        for model in models:
            with record_attention(model, tokens) as attention:
                model(**inputs)
            alone.append(attention.mass)
        with record_attention(models[0], tokens) as first, record_attention(models[1], tokens) as second:
            models[1](**inputs)
            models[0](**inputs)
    assert torch.equal(first.mass.nan_to_num(), alone[0].nan_to_num())
    assert torch.equal(second.mass.nan_to_num(), alone[1].nan_to_num())
    assert not torch.equal(first.mass.nan_to_num(), second.mass.nan_to_num())


def test_record_attention_one_model_per_thread_records_each(make_llava: Callable[..., Model], inputs: Inputs) -> None:
    models = [make_llava(seed=seed) for seed in range(4)]
    tokens = TokenMap.from_inputs(models[0], inputs)
    alone, together = {}, {}

    def record(seed: int, masses: dict[int, torch.Tensor]) -> None:
        with torch.no_grad(), record_attention(models[seed], tokens) as attention:
            models[seed](**inputs)
        masses[seed] = attention.mass.nan_to_num()

    for seed in range(4):
        record(seed, alone)
    threads = [threading.Thread(target=record, args=(seed, together)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(alone[seed], together[seed]) for seed in range(4))


def test_record_attention_second_thread_on_same_model_raises(make_llava: Callable[..., Model], inputs: Inputs) -> None:
    """A model may run in one other thread, but not in two threads."""
    model = make_llava()
    raised: list[BaseException] = []

    def call() -> None:
        try:
            with torch.no_grad():
                model(**inputs)
        except BaseException as error:
            raised.append(error)

    with record_attention(model, TokenMap.from_inputs(model, inputs)) as attention:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        assert not raised
        with pytest.raises(RuntimeError, match="a second thread calls a model that is being probed"), torch.no_grad():
            model(**inputs)
    assert attention.mass.shape[1] == 3


def test_record_attention_offloaded_weights_equals_plain_record(
    make_llava: Callable[..., Model], inputs: Inputs
) -> None:
    """accelerate loads the weights of a layer for each call; outside the call they are on the meta device."""
    from accelerate import cpu_offload

    model = make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad():
        with record_attention(model, tokens) as plain:
            model(**inputs)
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        with record_attention(model, tokens) as offloaded:
            model(**inputs)
    assert torch.equal(plain.mass.nan_to_num(), offloaded.mass.nan_to_num())


def test_record_attention_copy_made_inside_block_raises(make_llava: Callable[..., Model], inputs: Inputs) -> None:
    """The copy has the redirected config, but no record."""
    model = make_llava()
    with torch.no_grad():
        with record_attention(model, TokenMap.from_inputs(model, inputs)):
            copied = copy.deepcopy(model)
            expected = model(**inputs).logits
        with pytest.raises(RuntimeError, match=r"LlamaAttention was copied .* outside the block of record_attention"):
            copied(**inputs)
        assert torch.equal(model(**inputs).logits, expected)
