"""The record through nnsight and TransformerLens against our own and against eager attention; what they leave behind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight import NNsight
from transformers import LlavaForConditionalGeneration

from probes import RemoveTokens, TokenMap, intervene
from probes.attention.backends import underlying_model
from probes.attention.backends.shared_copy import twin
from probes.attention.backends.transformer_lens import wrap
from probes.attention.record import AttentionRecord
from probes.attention.recording import record_attention

Model = LlavaForConditionalGeneration
Inputs = dict[str, torch.Tensor]
VERSION = torch.__version__
BACKENDS = ["nnsight", "transformer_lens"]
ANSWER: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


def assert_same(one: AttentionRecord, other: AttentionRecord, tolerance: float = 1e-5) -> None:
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
def test_agrees_with_ours_and_with_eager(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], backend: str, side: str
) -> None:
    """Grouped heads, rows of unequal length, one of them without a picture."""
    model, inputs = make_llava(), make_inputs(side)
    tokens = TokenMap.from_inputs(model, inputs)
    with record_attention(model, tokens) as ours:
        model(**inputs)
    with record_attention(model, tokens, backend=backend) as theirs:
        logits = model(**inputs).logits
    eager = make_llava("eager")(**inputs, output_attentions=True)
    torch.testing.assert_close(logits, eager.logits, rtol=0, atol=1e-5)
    assert_same(theirs, ours)
    assert_same_frame(theirs, ours)

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
    "told", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=["dynamic", "static", "beams"]
)
def test_cached_decoding(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], backend: str, told: dict[str, Any]
) -> None:
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    with record_attention(model, tokens) as ours:
        answer = model.generate(**inputs, **ANSWER, **told)
    with record_attention(model, tokens, backend=backend) as theirs:
        assert torch.equal(model.generate(**inputs, **ANSWER, **told), answer)
    assert theirs.received.shape[-1] == tokens.labels.shape[1] + 2
    assert_same(theirs, ours)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_choice_of_layers_heads_and_targets(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], backend: str
) -> None:
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    choice: dict[str, Any] = {"layers": [2, 0], "heads": [3, 1], "targets": ["instruction", "vision"]}
    with record_attention(model, tokens, **choice) as ours:
        model(**inputs)
    with record_attention(model, tokens, **choice, backend=backend) as theirs:
        model(**inputs)
    assert_same(theirs, ours)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], backend: str) -> None:
    """Ours takes the scores of bfloat16 queries and keys in float32, theirs rounds the scores to bfloat16."""
    model, inputs = make_llava().to(torch.bfloat16), make_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    tokens = TokenMap.from_inputs(model, inputs)
    model.set_attn_implementation("eager")
    with record_attention(model, tokens) as ours:
        model(**inputs)
    with record_attention(model, tokens, backend=backend) as theirs:
        model(**inputs)
    assert_same(theirs, ours, tolerance=0.03)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_trained_model(backend: str) -> None:
    """The tiny LLaVA that the repository ships; its attention is sharper than a random model's."""
    folder = Path(__file__).parents[3] / "experiments" / "assets" / "tiny"
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    side = model.config.vision_config.image_size
    patches = (side // model.config.vision_config.patch_size) ** 2
    random = torch.Generator().manual_seed(0)
    words = torch.randint(5, model.config.text_config.vocab_size - 5, (2, 12), generator=random)
    words = words.masked_fill(words == model.config.image_token_id, 5)
    picture = torch.full((2, patches), model.config.image_token_id)
    inputs = {
        "input_ids": torch.cat([words[:, :4], picture, words[:, 4:]], dim=1),
        "pixel_values": torch.randn(2, 3, side, side, generator=random),
    }
    tokens = TokenMap.from_inputs(model, inputs)
    with record_attention(model, tokens) as ours:
        model(**inputs)
    with record_attention(model, tokens, backend=backend) as theirs:
        model(**inputs)
    assert ours.mass.nan_to_num().std() > 0.1
    assert_same(theirs, ours)


@torch.no_grad()
def test_beside_an_experiment_in_nnsight(make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]) -> None:
    """Ours is recorded with the same edit, which changes the layers behind it; edits of the user's stay."""
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    scale = torch.linspace(0, 2, 32)
    handle = model.get_decoder().layers[0].register_forward_hook(lambda module, args, output: output * scale)
    with record_attention(model, tokens) as ours:
        model(**inputs)
    handle.remove()

    wrapped = NNsight(twin(model))
    with wrapped.edit(inplace=True):
        wrapped.lm_head.output[:] = 0
    with record_attention(wrapped, tokens, backend="nnsight") as theirs, wrapped.trace(**inputs):
        wrapped.model.language_model.layers[0].output *= scale
        logits = wrapped.output.logits.save()
    assert not logits.any()
    assert_same(theirs, ours)
    assert len(wrapped._edits) == 1
    with wrapped.trace(**inputs):
        logits = wrapped.output.logits.save()
    assert not logits.any()


@torch.no_grad()
@pytest.mark.parametrize("how", ["mask", "drop"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_beside_an_intervention_of_ours(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], backend: str, how: Any
) -> None:
    """It works on the model that the back end runs; on one whose twin runs it says that it did nothing."""
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    removal = RemoveTokens("vision", layers=range(1, 3), how=how)
    with intervene(model, tokens, removal), record_attention(model, tokens) as ours:
        model(**inputs)
    wrapped = NNsight(twin(model)) if backend == "nnsight" else wrap(twin(model))
    held = underlying_model(wrapped, backend)
    with intervene(held, tokens, removal), record_attention(wrapped, tokens, backend=backend) as theirs:
        if backend == "nnsight":
            with wrapped.trace(**inputs):
                pass
        else:
            held(**inputs)
    assert_same(theirs, ours)
    nothing = pytest.raises(RuntimeError, match="did nothing")
    with nothing, intervene(model, tokens, removal), record_attention(model, tokens, backend=backend):
        model(**inputs)


@torch.no_grad()
@pytest.mark.filterwarnings("error")
def test_a_generation_in_nnsight(make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]) -> None:
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    with record_attention(model, tokens) as ours:
        model.generate(**inputs, **ANSWER)
    wrapped = NNsight(twin(model))
    with (
        record_attention(wrapped, tokens, backend="nnsight") as theirs,
        wrapped.trace(**inputs, fn="generate", **ANSWER),
    ):
        pass
    assert_same(theirs, ours)
    assert wrapped._module.get_decoder().config._attn_implementation == "sdpa"


@torch.no_grad()
def test_a_bridge_of_the_users(make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]) -> None:
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    scale = torch.linspace(0, 2, 32)
    handle = model.get_decoder().layers[0].register_forward_hook(lambda module, args, output: output * scale)
    with record_attention(model, tokens) as ours:
        model(**inputs)
    handle.remove()
    bridge = wrap(twin(model))
    hooks = [("blocks.0.hook_out", lambda tensor, hook: tensor * scale)]
    with record_attention(bridge, tokens, backend="transformer_lens") as theirs:
        bridge.run_with_hooks(
            inputs["input_ids"],
            fwd_hooks=hooks,
            attention_mask=inputs["attention_mask"],
            pixel_values=inputs["pixel_values"],
        )
    assert_same(theirs, ours)
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())


def state_of(model: Model) -> Any:
    """All that a back end could leave behind."""
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
def test_the_model_stays_as_it_is(
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
    assert torch.__version__ == VERSION  # a bridge that boots would have installed another


def test_a_twin_shares_its_weights(make_llava: Callable[..., Model]) -> None:
    model = make_llava()
    other = twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), other.buffers(), strict=True))
    assert not {id(module) for module in model.modules()} & {id(module) for module in other.modules()}
    assert other.config is not model.config
    assert other.get_decoder().config is other.config.text_config


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forward_of_the_models_own_comes_back(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], backend: str
) -> None:
    """As accelerate gives one to a model on several devices."""
    model, inputs = make_llava(), make_inputs()
    forward = model.forward
    model.forward = own = lambda **kwargs: forward(**kwargs)
    with torch.no_grad(), record_attention(model, TokenMap.from_inputs(model, inputs), backend=backend):
        model(**inputs)
    assert model.forward is own


@torch.no_grad()
@pytest.mark.parametrize("inner", ["native", *BACKENDS])
@pytest.mark.parametrize("outer", ["native", *BACKENDS])
def test_records_inside_each_other(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], outer: str, inner: str
) -> None:
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    with record_attention(model, tokens, backend=outer) as attention:
        with pytest.raises(RuntimeError, match="recorded already"), record_attention(model, tokens, backend=inner):
            pass
        model(**inputs)
    assert attention.mass.nan_to_num().any()


@pytest.mark.parametrize(
    ("make", "backend", "message"),
    [
        (lambda model: model, "nosuch", "unknown backend 'nosuch': choose native, nnsight or transformer_lens"),
        (lambda model: NNsight(model), "native", "a NNsight cannot be recorded"),
        (lambda model: NNsight(model), "transformer_lens", "a NNsight is no TransformerBridge"),
        (lambda model: wrap(model), "nnsight", "a TransformerBridge is no NNsight"),
        (lambda model: wrap(model), "native", "a TransformerBridge cannot be recorded"),
        (lambda model: wrap(model).original_model, "transformer_lens", "rebuilt this model already: pass its bridge"),
        (lambda model: NNsight(torch.nn.Linear(2, 2)), "nnsight", "no NNsight of a transformers model"),
    ],
)
def test_what_cannot_be_recorded(
    make_llava: Callable[..., Model],
    make_inputs: Callable[..., Inputs],
    make: Callable[[Model], Any],
    backend: str,
    message: str,
) -> None:
    model = make_llava()
    tokens = TokenMap.from_inputs(model, make_inputs())
    with pytest.raises(ValueError, match=message), record_attention(make(model), tokens, backend=backend):
        pass


def test_an_architecture_without_an_adapter(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    class Unheard(LlavaForConditionalGeneration):
        pass

    model = Unheard(make_llava().config)
    tokens = TokenMap.from_inputs(model, make_inputs())
    refused = pytest.raises(ValueError, match="no adapter for Unheard")
    with refused, record_attention(model, tokens, backend="transformer_lens"):
        pass


@torch.no_grad()
def test_attention_that_nnsight_cannot_read(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    with_sinks = make_llava()
    with_sinks.get_decoder().layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    inputs = make_inputs()
    for model in (wrap(make_llava()).original_model, with_sinks):
        refused = pytest.raises(ValueError, match="no softmax over the keys alone")
        with refused, record_attention(model, TokenMap.from_inputs(model, inputs), backend="nnsight"):
            model(**inputs)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout(make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], backend: str) -> None:
    """Ours and nnsight's are ahead of it; TransformerLens shows weights that have lost some."""
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    with record_attention(model, tokens, layers=[0]) as ours:
        model(**inputs)
    model.train()
    for layer in model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.5
    lost = pytest.raises(RuntimeError, match="with dropout") if backend == "transformer_lens" else nullcontext()
    with lost, record_attention(model, tokens, layers=[0], backend=backend) as theirs:
        model(**inputs)
    if backend == "nnsight":
        assert_same(theirs, ours)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_too_many_and_none(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], backend: str
) -> None:
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    with record_attention(model, tokens, backend=backend) as attention:
        with pytest.raises(RuntimeError, match="nothing was recorded"):
            _ = attention.mass
        model(**inputs)
        with pytest.raises(RuntimeError, match="second prompt"):
            model(**inputs)
