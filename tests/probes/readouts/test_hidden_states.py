from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, LlavaForConditionalGeneration

from probes import TokenMap
from probes.readouts.hidden_states import record_states

Inputs = dict[str, Tensor]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_residuals_are_transformers_hidden_states(
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
    assert torch.equal(norm(states[2]), expected[3][vision])  # transformers applies it to its last one


@torch.no_grad()
def test_attention_and_mlp_add_up_to_the_residual(
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


@torch.no_grad()
def test_a_prompt_in_pieces_gives_the_states_of_the_whole(
    make_llama: Callable[..., LlamaForCausalLM], make_inputs: Callable[..., Inputs]
) -> None:
    model, inputs = make_llama(), make_inputs()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    tokens = TokenMap.from_inputs(model, inputs)
    positions = tokens.mask("instruction") | tokens.mask("vision")
    with record_states(model, tokens, positions) as whole:
        model(input_ids=ids, attention_mask=mask)
    cache, cut = DynamicCache(), 5
    with record_states(model, tokens, positions) as pieces:
        place = (mask.cumsum(1) - 1).clamp(min=0)
        first = {"input_ids": ids[:, :cut], "attention_mask": mask[:, :cut], "position_ids": place[:, :cut]}
        model(**first, past_key_values=cache)
        model(input_ids=ids[:, cut:], attention_mask=mask, position_ids=place[:, cut:], past_key_values=cache)
        model(input_ids=ids[:, :1], past_key_values=cache)  # generated: no position of the map
    for layer in whole.layers:
        # A padded query attends to nothing in both, but not in the same way.
        torch.testing.assert_close(whole[layer], pieces[layer], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"component": "resid"}, "unknown component 'resid': there are residual, attention, mlp"),
        ({"at": "image"}, "unknown group 'image'"),
        ({"layers": [3]}, r"layers \[3\] are outside the model"),
    ],
)
def test_bad_input_is_one_clear_error(
    make_llava: Callable[..., LlavaForConditionalGeneration],
    make_inputs: Callable[..., Inputs],
    wrong: dict[str, Any],
    message: str,
) -> None:
    model = make_llava()
    tokens = TokenMap.from_inputs(model, make_inputs())
    with pytest.raises(ValueError, match=message), record_states(model, tokens, **{"at": "vision"} | wrong):
        pass


def test_states_without_a_forward_pass_are_an_error(
    make_llava: Callable[..., LlavaForConditionalGeneration], make_inputs: Callable[..., Inputs]
) -> None:
    model = make_llava()
    with record_states(model, TokenMap.from_inputs(model, make_inputs()), "vision") as states:
        pass
    with pytest.raises(RuntimeError, match="states were not recorded"):
        states[0]
