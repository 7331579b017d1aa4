"""Attention records through nnsight and TransformerLens against the native record, and what they leave on the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight import NNsight
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import LlavaForConditionalGeneration

from probes import RemoveTokens, TokenMap, intervene
from probes.attention.backends import underlying_model
from probes.attention.backends.shared_copy import copy_sharing_weights
from probes.attention.backends.transformer_lens import wrap
from probes.attention.record import AttentionRecord
from probes.attention.recording import record_attention

Model = LlavaForConditionalGeneration
Inputs = dict[str, torch.Tensor]
VERSION = torch.__version__
BACKENDS = ["nnsight", "transformer_lens"]
ANSWER: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


def assert_same_record(one: AttentionRecord, other: AttentionRecord, tolerance: float = 1e-5) -> None:
    assert (one.layers, one.heads, one.targets, one.sources) == (
        other.layers,
        other.heads,
        other.targets,
        other.sources,
    )
    assert torch.equal(one.queries, other.queries)
    for name in ("mass", "entropy", "received"):
        values, expected = getattr(one, name), getattr(other, name)
        assert values.nan_to_num().any()
        torch.testing.assert_close(values, expected, rtol=0, atol=tolerance, equal_nan=True)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_backend_record_prompt_equals_native_record_and_eager_weights(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], backend: str, side: str
) -> None:
    """Grouped heads, and rows of unequal length, one of them without an image."""
    model, inputs = make_llava(), make_inputs(side)
    tokens = TokenMap.from_inputs(model, inputs)
    with record_attention(model, tokens) as native:
        model(**inputs)
    with record_attention(model, tokens, backend=backend) as theirs:
        logits = model(**inputs).logits
    eager = make_llava("eager")(**inputs, output_attentions=True)
    torch.testing.assert_close(logits, eager.logits, rtol=0, atol=1e-5)
    assert_same_record(theirs, native)
    assert_same_frame(theirs, native)

    weights = torch.stack(eager.attentions)
    of_instruction, of_vision = tokens.mask("instruction"), tokens.mask("vision")
    for row in range(2):
        expected = weights[:, row][:, :, of_instruction[row]][..., of_vision[row]].sum(-1).mean(-1)
        cell = theirs.mass[:, row, :, theirs.targets.index("instruction"), theirs.sources.index("vision")]
        torch.testing.assert_close(cell, expected, rtol=0, atol=1e-6)


def assert_same_frame(one: AttentionRecord, other: AttentionRecord) -> None:
    keys = ["layer", "sample", "head", "target", "source", "queries"]
    assert one.frame()[keys].equals(other.frame()[keys])


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=["dynamic", "static", "beams"]
)
def test_backend_record_cached_decoding_equals_native_record(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], backend: str, options: dict[str, Any]
) -> None:
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    with record_attention(model, tokens) as native:
        answer = model.generate(**inputs, **ANSWER, **options)
    with record_attention(model, tokens, backend=backend) as theirs:
        assert torch.equal(model.generate(**inputs, **ANSWER, **options), answer)
    assert theirs.received.shape[-1] == tokens.labels.shape[1] + 2
    assert_same_record(theirs, native)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_record_selected_layers_heads_targets_equals_native_record(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], backend: str
) -> None:
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    selection: dict[str, Any] = {"layers": [2, 0], "heads": [3, 1], "targets": ["instruction", "vision"]}
    with record_attention(model, tokens, **selection) as native:
        model(**inputs)
    with record_attention(model, tokens, **selection, backend=backend) as theirs:
        model(**inputs)
    assert_same_record(theirs, native)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_record_bfloat16_is_close_to_native_record(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], backend: str
) -> None:
    """The native record computes scores in float32 from bfloat16 states; the back ends round scores to bfloat16."""
    model, inputs = make_llava().to(torch.bfloat16), make_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    tokens = TokenMap.from_inputs(model, inputs)
    model.set_attn_implementation("eager")
    with record_attention(model, tokens) as native:
        model(**inputs)
    with record_attention(model, tokens, backend=backend) as theirs:
        model(**inputs)
    assert_same_record(theirs, native, tolerance=0.03)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_record_trained_model_equals_native_record(backend: str) -> None:
    """The tiny LLaVA of the repository, whose attention is sharper than a random model's."""
    folder = Path(__file__).parents[3] / "experiments" / "assets" / "tiny"
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    side = model.config.vision_config.image_size
    patches = (side // model.config.vision_config.patch_size) ** 2
    random = torch.Generator().manual_seed(0)
    words = torch.randint(5, model.config.text_config.vocab_size - 5, (2, 12), generator=random)
    words = words.masked_fill(words == model.config.image_token_id, 5)
    image = torch.full((2, patches), model.config.image_token_id)
    inputs = {
        "input_ids": torch.cat([words[:, :4], image, words[:, 4:]], dim=1),
        "pixel_values": torch.randn(2, 3, side, side, generator=random),
    }
    tokens = TokenMap.from_inputs(model, inputs)
    with record_attention(model, tokens) as native:
        model(**inputs)
    with record_attention(model, tokens, backend=backend) as theirs:
        model(**inputs)
    assert native.mass.nan_to_num().std() > 0.1
    assert_same_record(theirs, native)


@torch.no_grad()
def test_nnsight_record_with_user_edits_equals_native_record_and_keeps_edits(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """The native record runs under the same edit, which changes the layers after it. The user's own edits stay."""
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    scale = torch.linspace(0, 2, 32)
    handle = model.get_decoder().layers[0].register_forward_hook(lambda module, args, output: output * scale)
    with record_attention(model, tokens) as native:
        model(**inputs)
    handle.remove()

    wrapped = NNsight(copy_sharing_weights(model))
    with wrapped.edit(inplace=True):
        wrapped.lm_head.output[:] = 0
    with record_attention(wrapped, tokens, backend="nnsight") as theirs, wrapped.trace(**inputs):
        wrapped.model.language_model.layers[0].output *= scale
        logits = wrapped.output.logits.save()
    assert not logits.any()
    assert_same_record(theirs, native)
    assert len(wrapped._edits) == 1
    with wrapped.trace(**inputs):
        logits = wrapped.output.logits.save()
    assert not logits.any()


@torch.no_grad()
@pytest.mark.parametrize("how", ["mask", "drop"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_record_inside_intervention_equals_native_record(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], backend: str, how: Any
) -> None:
    """The intervention acts on the model that the back end runs. If a copy of the model runs, it did nothing."""
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    removal = RemoveTokens("vision", layers=range(1, 3), how=how)
    with intervene(model, tokens, removal), record_attention(model, tokens) as native:
        model(**inputs)
    wrapped = NNsight(copy_sharing_weights(model)) if backend == "nnsight" else wrap(copy_sharing_weights(model))
    held = underlying_model(wrapped, backend)
    with intervene(held, tokens, removal), record_attention(wrapped, tokens, backend=backend) as theirs:
        if backend == "nnsight":
            with wrapped.trace(**inputs):
                pass
        else:
            held(**inputs)
    assert_same_record(theirs, native)
    raises = pytest.raises(RuntimeError, match="did nothing")
    with raises, intervene(model, tokens, removal), record_attention(model, tokens, backend=backend):
        model(**inputs)


@torch.no_grad()
@pytest.mark.filterwarnings("error")
def test_nnsight_record_traced_generation_equals_native_record(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    with record_attention(model, tokens) as native:
        model.generate(**inputs, **ANSWER)
    wrapped = NNsight(copy_sharing_weights(model))
    with (
        record_attention(wrapped, tokens, backend="nnsight") as theirs,
        wrapped.trace(**inputs, fn="generate", **ANSWER),
    ):
        pass
    assert_same_record(theirs, native)
    assert wrapped._module.get_decoder().config._attn_implementation == "sdpa"


@torch.no_grad()
def test_transformer_lens_record_user_bridge_equals_native_record(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    scale = torch.linspace(0, 2, 32)
    handle = model.get_decoder().layers[0].register_forward_hook(lambda module, args, output: output * scale)
    with record_attention(model, tokens) as native:
        model(**inputs)
    handle.remove()
    bridge = wrap(copy_sharing_weights(model))
    hooks = [("blocks.0.hook_out", lambda tensor, hook: tensor * scale)]
    with record_attention(bridge, tokens, backend="transformer_lens") as theirs:
        bridge.run_with_hooks(
            inputs["input_ids"],
            fwd_hooks=hooks,
            attention_mask=inputs["attention_mask"],
            pixel_values=inputs["pixel_values"],
        )
    assert_same_record(theirs, native)
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())


@torch.no_grad()
def test_transformer_lens_record_generation_of_bridge_without_wrap_equals_native_record(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """From transformers 5.24 on, a bridge's attention does not know the cache's name until the record begins."""
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    with record_attention(model, tokens) as native:
        expected = model.generate(**inputs, **ANSWER)
    copy = copy_sharing_weights(model)
    bridge = build_bridge_from_module(copy, type(copy).__name__, hf_config=copy.config)
    with record_attention(bridge, tokens, backend="transformer_lens") as theirs:
        assert torch.equal(bridge.original_model.generate(**inputs, **ANSWER), expected)
    assert_same_record(theirs, native)


def state_of(model: Model) -> Any:
    """Return everything that a back end could leave behind."""
    return (
        list(model.state_dict()),
        [type(module) for module in model.modules()],
        [str(module.config) for module in model.modules() if hasattr(module, "config")],
        [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")],
        [(dict(module._forward_pre_hooks), dict(module._forward_hooks)) for module in model.modules()],
        [sorted(vars(module)) for module in model.modules()],
    )


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_record_leaves_model_unchanged(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], backend: str
) -> None:
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    expected = model(**inputs).logits
    before = state_of(model)
    with record_attention(model, tokens, backend=backend):
        model(**inputs)
    assert state_of(model) == before
    with pytest.raises(ValueError, match="token map has 3 x 13"), record_attention(model, tokens, backend=backend):
        model(**{name: values[:2] for name, values in inputs.items()})
    assert state_of(model) == before
    with pytest.raises(KeyError, match="from inside"), record_attention(model, tokens, backend=backend):
        raise KeyError("from inside")
    assert state_of(model) == before
    assert torch.equal(model(**inputs).logits, expected)
    assert torch.__version__ == VERSION  # a bridge that boots could install another version


def test_copy_sharing_weights_shares_tensors_and_copies_modules(make_llava: Callable[..., Model]) -> None:
    model = make_llava()
    other = copy_sharing_weights(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), other.buffers(), strict=True))
    assert not {id(module) for module in model.modules()} & {id(module) for module in other.modules()}
    assert other.config is not model.config
    assert other.get_decoder().config is other.config.text_config


@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_record_restores_instance_forward(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], backend: str
) -> None:
    """accelerate sets such a forward on a model on several devices."""
    model, inputs = make_llava(), make_inputs()
    forward = model.forward
    model.forward = instance_forward = lambda **kwargs: forward(**kwargs)
    with torch.no_grad(), record_attention(model, TokenMap.from_inputs(model, inputs), backend=backend):
        model(**inputs)
    assert model.forward is instance_forward


@torch.no_grad()
@pytest.mark.parametrize("inner", ["native", *BACKENDS])
@pytest.mark.parametrize("outer", ["native", *BACKENDS])
def test_record_attention_nested_on_one_model_raises(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], outer: str, inner: str
) -> None:
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    with record_attention(model, tokens, backend=outer) as attention:
        with pytest.raises(RuntimeError, match="recorded already"), record_attention(model, tokens, backend=inner):
            pass
        model(**inputs)
    assert attention.mass.nan_to_num().any()
