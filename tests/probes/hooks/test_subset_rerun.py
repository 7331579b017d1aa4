"""SubsetRerun, through `replay(..., rows=...)`: repeated calls on some positions against whole calls."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from probes.attention.recording import record_attention
from probes.hooks.decoder import decoder_layers, find_decoder
from probes.hooks.subset_rerun import _affected_positions
from probes.interventions import BlockAttention, PatchActivations, RemoveTokens, intervene
from probes.readouts.hidden_states import record_states
from probes.replay import replay
from probes.tokens.token_map import TokenMap

LAYERS = 3
Make = Callable[..., Any]


def text_after_image(tokens: TokenMap) -> Tensor:
    """Return the mask of the text positions after the image."""
    return tokens.mask("instruction") & (tokens.mask("vision").cumsum(1) > 0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_subset_rerun_equals_whole_calls(make_llava: Make, make_inputs: Make, attention: str, side: str) -> None:
    """Logits and states of all positions are equal, for every start layer and every intervention."""
    model, inputs = make_llava(attention), make_inputs(side)
    tokens = TokenMap.from_inputs(model, inputs)
    rows, real = text_after_image(tokens), ~tokens.mask("pad")
    with torch.no_grad(), replay(model, range(LAYERS), rows) as since:
        intact = model(**inputs).logits
        assert torch.equal(intact, model(**inputs).logits), "calls outside `since` run whole"
        for start in range(LAYERS):
            changes = [
                [BlockAttention("vision", "instruction", [start])],
                [BlockAttention("vision", "instruction", range(start, LAYERS))],
                [PatchActivations(rows, [start], "residual", "noise", std=1.0)],
                [PatchActivations(rows, [start], "mlp", "zero"), BlockAttention("vision", "instruction", [LAYERS - 1])],
            ]
            for change in changes:
                with intervene(model, tokens, *change), record_states(model, tokens, real, [LAYERS - 1]) as expected:
                    logits = model(**inputs).logits
                with (
                    since(start),
                    intervene(model, tokens, *change),
                    record_states(model, tokens, real, [LAYERS - 1]) as actual,
                ):
                    again = model(**inputs).logits
                torch.testing.assert_close(again[real], logits[real], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(actual[LAYERS - 1], expected[LAYERS - 1], atol=1e-5, rtol=1e-5)
                assert torch.equal(again[real & ~rows], intact[real & ~rows])
                assert (logits - intact)[rows].abs().amax() > 1e-2


def test_subset_rerun_runs_only_positions_of_subset(make_llava: Make, make_inputs: Make) -> None:
    """The longest row determines how many positions run; a single position works."""
    model, inputs = make_llava(), make_inputs("left")
    tokens = TokenMap.from_inputs(model, inputs)
    last = torch.zeros_like(text_after_image(tokens))
    last[:, -1] = True
    for rows, width in ((text_after_image(tokens), 6), (last, 1)):
        ran: list[tuple[int, int]] = []
        with ExitStack() as stack, torch.no_grad():
            for number, layer in enumerate(decoder_layers(find_decoder(model))):

                def record_width(mlp: Any, args: Any, output: Any, number: int = number, ran: Any = ran) -> None:
                    ran.append((number, output.shape[1]))

                stack.callback(layer.mlp.register_forward_hook(record_width).remove)
            with replay(model, [1], rows) as since:
                for _ in range(2):  # the first run is whole, since nothing is stored before it
                    with since(1):
                        logits = model(**inputs).logits
                with since(1), intervene(model, tokens, BlockAttention("vision", rows, [1])) as receipt:
                    blocked = model(**inputs).logits
            assert ran == [(layer, 13) for layer in range(LAYERS)] + 2 * [(1, width), (2, width)]
            with intervene(model, tokens, BlockAttention("vision", rows, [1])) as expected:
                torch.testing.assert_close(blocked[rows], model(**inputs).logits[rows], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)
            assert receipt[0] == expected[0]


def test_record_attention_in_subset_rerun_equals_whole_call(make_llava: Make, make_inputs: Make) -> None:
    """The record covers the queries that run, over all keys."""
    model, inputs = make_llava(), make_inputs("right")
    labels = TokenMap.from_inputs(model, inputs)
    tokens = labels.relabel({"question": text_after_image(labels)})
    cut = BlockAttention("vision", "question", [1])
    records = []
    with torch.no_grad(), replay(model, [0], text_after_image(labels)) as since:
        model(**inputs)
        for rerun in (False, True):
            with ExitStack() as stack:
                if rerun:
                    stack.enter_context(since(0))
                stack.enter_context(intervene(model, tokens, cut))
                records.append(stack.enter_context(record_attention(model, tokens, targets=["question"])))
                model(**inputs)
    for name in ("mass", "entropy", "received", "queries"):
        whole, subset = (getattr(record, name) for record in records)
        torch.testing.assert_close(subset, whole, atol=1e-5, rtol=0, equal_nan=True)


def test_subset_rerun_with_unsupported_call_raises_value_error(make_llava: Make, make_inputs: Make) -> None:
    model, inputs = make_llava(), make_inputs("left")
    tokens = TokenMap.from_inputs(model, inputs)
    rows, layers = text_after_image(tokens), decoder_layers(find_decoder(model))
    layers[1].forward = own = layers[1].forward  # as accelerate does where weights are offloaded
    messages = {
        r"layer 1: attention edges outside `rows` differ": RemoveTokens("vision", [1]),
        r"layer 1 .*cannot drop tokens": RemoveTokens("vision", [1], how="drop"),
        r"layer 2: hidden states outside `rows` differ": PatchActivations("vision", [1], "residual", "zero"),
    }
    with torch.no_grad(), replay(model, [1], rows) as since:
        intact = model(**inputs).logits
        for message, change in messages.items():
            with pytest.raises(ValueError, match=message), since(1), intervene(model, tokens, change):
                model(**inputs)
        with pytest.raises(ValueError, match=r"\[1, 3, 32\] \(batch, length, width\) cannot resume"), since(1):
            model(input_ids=torch.tensor([[1, 2, 3]]))
        with since(1):
            torch.testing.assert_close(model(**inputs).logits, intact, atol=1e-5, rtol=1e-5)
        assert torch.equal(model(**inputs).logits, intact)
    assert layers[1].forward is own
    assert "forward" not in vars(layers[0]) | vars(layers[2])
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    assert not any("_probes_call_subset" in vars(layer) for layer in layers)
    wrong = r"`rows` have shape \[3, 12\].*\[3, 13\] positions.*13 keys"
    with torch.no_grad(), pytest.raises(ValueError, match=wrong), replay(model, [1], rows[:, 1:]):
        model(**inputs)
    sizes = {"vocab_size": 8, "hidden_size": 8, "ffn_dim": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    opt = OPTForCausalLM(OPTConfig(word_embed_proj_dim=8, **sizes))
    with pytest.raises(ValueError, match=r"OPTDecoder cannot run .*`rows`"), replay(opt, [0], rows):
        pass


def test_subset_rerun_after_failed_first_call_runs_whole(make_llava: Make, make_inputs: Make) -> None:
    model, inputs = make_llava(), make_inputs("left")
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad():
        intact = model(**inputs).logits
    with torch.no_grad(), replay(model, [1], text_after_image(tokens)) as since:
        fail = decoder_layers(find_decoder(model))[2].mlp.register_forward_hook(lambda *_: 1 / 0)
        others = inputs["input_ids"].where(inputs["input_ids"] == 63, 5)
        with pytest.raises(ZeroDivisionError):
            model(**inputs | {"input_ids": others})
        fail.remove()
        with since(1):
            assert torch.equal(model(**inputs).logits, intact), "the call runs whole"
        with since(1):
            torch.testing.assert_close(model(**inputs).logits, intact, atol=1e-5, rtol=1e-5)


@given(st.integers(1, 6), st.data())
def test_affected_positions_equals_matrix_power_reachability(length: int, data: st.DataObject) -> None:
    """Positions that reach one of the rows along attention edges, computed by powers of the edge matrix."""
    bits = st.lists(st.booleans(), min_size=length, max_size=length)
    edges = torch.tensor(data.draw(st.lists(bits, min_size=length, max_size=length)))
    rows = torch.tensor(data.draw(bits))
    reach = torch.linalg.matrix_power(edges.double() + torch.eye(length), length)
    assert torch.equal(_affected_positions(rows[None], edges[None])[0], (reach @ rows.double()) > 0)
