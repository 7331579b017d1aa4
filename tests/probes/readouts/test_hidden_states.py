"""`record_states` against transformers' own hidden states, in one call and in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, LlavaForConditionalGeneration

from probes import BlockAttention, PatchActivations, RemoveTokens, TokenMap, intervene
from probes.readouts.hidden_states import record_states

Inputs = dict[str, Tensor]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_record_states_residual_equals_transformers_hidden_states(
    make_llava: Callable[..., LlavaForConditionalGeneration], make_inputs: Callable[..., Inputs], side: str
) -> None:
    model, inputs = make_llava(), make_inputs(side)
    tokens = TokenMap.from_inputs(model, inputs)
    expected = model(**inputs, output_hidden_states=True).hidden_states
    norm = model.get_decoder().norm
    with record_states(model, tokens, "vision") as states:
        model(**inputs)
    vision = tokens.mask("vision")
    assert torch.equal(states.index, vision.nonzero())
    assert torch.equal(states[0], expected[1][vision])
    assert torch.equal(states[1], expected[2][vision])
    assert torch.equal(norm(states[2]), expected[3][vision])  # transformers applies the norm to the last one


@torch.no_grad()
def test_record_states_attention_and_mlp_sum_to_residual(
    make_llava: Callable[..., LlavaForConditionalGeneration], make_inputs: Callable[..., Inputs]
) -> None:
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    before = model(**inputs, output_hidden_states=True).hidden_states[1][tokens.mask("instruction")]
    parts = []
    for component in ("attention", "mlp", "residual"):
        with record_states(model, tokens, "instruction", layers=[1], component=component) as states:
            model(**inputs)
        parts.append(states[1])
    attention, mlp, after = parts
    torch.testing.assert_close(before + attention + mlp, after)


@pytest.mark.parametrize("component", ["residual", "attention", "mlp"])
@pytest.mark.parametrize("name", ["mask", "drop", "keep_cache", "block", "patch"])
@torch.no_grad()
def test_record_states_around_interventions_equals_record_states_inside(
    make_llava: Callable[..., LlavaForConditionalGeneration],
    make_inputs: Callable[..., Inputs],
    name: str,
    component: Any,
) -> None:
    """Row 1 begins with its image: without edges inside the image, its visual tokens have no key."""
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    intervention: Any = {
        "mask": RemoveTokens("vision", [1]),
        "drop": RemoveTokens("vision", [1], how="drop"),
        "keep_cache": RemoveTokens("vision", [1], how="drop", keep_cache=True),
        "block": BlockAttention("vision", "vision", [1]),
        "patch": PatchActivations("vision", [1], component, "zero"),
    }[name]
    with record_states(model, tokens, "vision", component=component) as around, intervene(model, tokens, intervention):
        model(**inputs)
    with intervene(model, tokens, intervention), record_states(model, tokens, "vision", component=component) as inside:
        model(**inputs)
    for layer in range(3):
        assert torch.equal(around[layer].nan_to_num(9), inside[layer].nan_to_num(9))
    if component == "residual" and name not in ("block", "patch"):
        assert torch.equal(around[1], around[0]), "removed tokens pass through"
    if name == "patch":
        assert not around[1].any()
    if (name, component) == ("block", "attention"):
        assert not around[1][around.index[:, 0] == 1].any(), "no key, so no output"


@torch.no_grad()
def test_record_states_chunked_prompt_equals_one_pass(
    make_llama: Callable[..., LlamaForCausalLM], make_inputs: Callable[..., Inputs]
) -> None:
    model, inputs = make_llama(), make_inputs()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    tokens = TokenMap.from_inputs(model, inputs)
    positions = tokens.mask("instruction") | tokens.mask("vision")
    with record_states(model, tokens, positions) as whole:
        model(input_ids=ids, attention_mask=mask)
    cache, first_chunk = DynamicCache(), 5
    with record_states(model, tokens, positions) as chunks:
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        first = {
            "input_ids": ids[:, :first_chunk],
            "attention_mask": mask[:, :first_chunk],
            "position_ids": position_ids[:, :first_chunk],
        }
        model(**first, past_key_values=cache)
        model(
            input_ids=ids[:, first_chunk:],
            attention_mask=mask,
            position_ids=position_ids[:, first_chunk:],
            past_key_values=cache,
        )
        model(input_ids=ids[:, :1], past_key_values=cache)  # a generated token, which has no position in the map
    for layer in whole.layers:
        # A padded query has no visible key in both runs, but is not computed in the same way.
        torch.testing.assert_close(whole[layer], chunks[layer], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"component": "resid"}, "unknown component 'resid'.*residual, attention, mlp"),
        ({"at": "image"}, "unknown group 'image'"),
        ({"layers": [3]}, r"layers \[3\] are outside the model"),
        ({"at": torch.ones(3, 13, dtype=torch.long)}, r"mask .* torch.int64 .*\[3, 13\]"),
        ({"at": torch.ones(1, 13, dtype=torch.bool)}, r"mask .*\[1, 13\].*\[3, 13\]"),
        ({"at": torch.ones(4, 13, dtype=torch.bool)}, r"mask .*\[4, 13\].*\[3, 13\]"),
        ({"at": torch.ones(3, 5, dtype=torch.bool)}, r"mask .*\[3, 5\].*\[3, 13\]"),
        ({"at": [[True] * 13] * 3}, r"mask .* list"),
    ],
)
def test_record_states_invalid_argument_raises(
    make_llava: Callable[..., LlavaForConditionalGeneration],
    make_inputs: Callable[..., Inputs],
    arguments: dict[str, Any],
    message: str,
) -> None:
    model = make_llava()
    tokens = TokenMap.from_inputs(model, make_inputs())
    with pytest.raises(ValueError, match=message), record_states(model, tokens, **{"at": "vision"} | arguments):
        pass


def test_states_without_forward_pass_raise(
    make_llava: Callable[..., LlavaForConditionalGeneration], make_inputs: Callable[..., Inputs]
) -> None:
    model = make_llava()
    with record_states(model, TokenMap.from_inputs(model, make_inputs()), "vision") as states:
        pass
    with pytest.raises(RuntimeError, match="states were not recorded"):
        states[0]
