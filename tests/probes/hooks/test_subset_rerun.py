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
from probes.hooks.subset_rerun import _closure
from probes.interventions import BlockAttention, PatchActivations, RemoveTokens, intervene
from probes.readouts.hidden_states import record_states
from probes.replay import replay
from probes.tokens.token_map import TokenMap

LAYERS = 3
Make = Callable[..., Any]


def behind(tokens: TokenMap) -> Tensor:
    """Text behind the picture."""
    return tokens.mask("instruction") & (tokens.mask("vision").cumsum(1) > 0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_as_whole_calls(make_llava: Make, make_inputs: Make, attention: str, side: str) -> None:
    """Logits and states of all positions, whichever of the starts the run goes back to and whatever is done there."""
    model, inputs = make_llava(attention), make_inputs(side)
    tokens = TokenMap.from_inputs(model, inputs)
    rows, real = behind(tokens), ~tokens.mask("pad")
    with torch.no_grad(), replay(model, range(LAYERS), rows) as since:
        intact = model(**inputs).logits
        assert torch.equal(intact, model(**inputs).logits), "whole outside `since`"
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
                    record_states(model, tokens, real, [LAYERS - 1]) as found,
                ):
                    again = model(**inputs).logits
                torch.testing.assert_close(again[real], logits[real], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(found[LAYERS - 1], expected[LAYERS - 1], atol=1e-5, rtol=1e-5)
                assert torch.equal(again[real & ~rows], intact[real & ~rows])
                assert (logits - intact)[rows].abs().amax() > 1e-2


def test_the_others_do_not_run(make_llava: Make, make_inputs: Make) -> None:
    """The longest row's tell how many positions run; one is enough."""
    model, inputs = make_llava(), make_inputs("left")
    tokens = TokenMap.from_inputs(model, inputs)
    last = torch.zeros_like(behind(tokens))
    last[:, -1] = True
    for rows, width in ((behind(tokens), 6), (last, 1)):
        ran: list[tuple[int, int]] = []
        with ExitStack() as stack, torch.no_grad():
            for number, layer in enumerate(decoder_layers(find_decoder(model))):

                def note(mlp: Any, args: Any, output: Any, number: int = number, ran: Any = ran) -> None:
                    ran.append((number, output.shape[1]))

                stack.callback(layer.mlp.register_forward_hook(note).remove)
            with replay(model, [1], rows) as since:
                for _ in range(2):  # nothing is kept before the first run: it is whole
                    with since(1):
                        logits = model(**inputs).logits
                with since(1), intervene(model, tokens, BlockAttention("vision", rows, [1])) as receipt:
                    blocked = model(**inputs).logits
            assert ran == [(layer, 13) for layer in range(LAYERS)] + 2 * [(1, width), (2, width)]
            with intervene(model, tokens, BlockAttention("vision", rows, [1])) as expected:
                torch.testing.assert_close(blocked[rows], model(**inputs).logits[rows], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)
            assert receipt[0] == expected[0]


def test_attention_is_recorded(make_llava: Make, make_inputs: Make) -> None:
    """Of the queries that run, over all keys."""
    model, inputs = make_llava(), make_inputs("right")
    labels = TokenMap.from_inputs(model, inputs)
    tokens = labels.relabel({"question": behind(labels)})
    cut = BlockAttention("vision", "question", [1])
    records = []
    with torch.no_grad(), replay(model, [0], behind(labels)) as since:
        model(**inputs)
        for start in (False, True):
            with ExitStack() as stack:
                if start:
                    stack.enter_context(since(0))
                stack.enter_context(intervene(model, tokens, cut))
                records.append(stack.enter_context(record_attention(model, tokens, targets=["question"])))
                model(**inputs)
    for name in ("mass", "entropy", "received", "queries"):
        whole, alone = (getattr(record, name) for record in records)
        torch.testing.assert_close(alone, whole, atol=1e-5, rtol=0, equal_nan=True)


def test_what_cannot_be_is_refused(make_llava: Make, make_inputs: Make) -> None:
    model, inputs = make_llava(), make_inputs("left")
    tokens = TokenMap.from_inputs(model, inputs)
    rows, layers = behind(tokens), decoder_layers(find_decoder(model))
    layers[1].forward = own = layers[1].forward  # as accelerate has it, where weights are offloaded
    refused = {
        r"layer 1: what is seen from positions outside `rows` is not": RemoveTokens("vision", [1]),
        r"layer 1 runs some rows alone and cannot drop tokens": RemoveTokens("vision", [1], how="drop"),
        r"layer 2: what comes in at positions outside `rows` is not": PatchActivations(
            "vision", [1], "residual", "zero"
        ),
    }
    with torch.no_grad(), replay(model, [1], rows) as since:
        intact = model(**inputs).logits
        for message, change in refused.items():
            with pytest.raises(ValueError, match=message), since(1), intervene(model, tokens, change):
                model(**inputs)
        with pytest.raises(ValueError, match=r"\[1, 3, 32\] \(batch, length, width\) cannot take up"), since(1):
            model(input_ids=torch.tensor([[1, 2, 3]]))
        with since(1):
            torch.testing.assert_close(model(**inputs).logits, intact, atol=1e-5, rtol=1e-5)
        assert torch.equal(model(**inputs).logits, intact)
    assert layers[1].forward is own
    assert "forward" not in vars(layers[0]) | vars(layers[2])
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    assert not any("_probes_cut" in vars(layer) for layer in layers)
    wrong = r"rows are of shape \[3, 12\], the call has \[3, 13\] positions \(batch x length\) and 13 keys"
    with torch.no_grad(), pytest.raises(ValueError, match=wrong), replay(model, [1], rows[:, 1:]):
        model(**inputs)
    sizes = {"vocab_size": 8, "hidden_size": 8, "ffn_dim": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    opt = OPTForCausalLM(OPTConfig(word_embed_proj_dim=8, **sizes))
    with pytest.raises(ValueError, match="OPTDecoder cannot run on some rows alone"), replay(opt, [0], rows):
        pass


def test_a_first_call_that_fails_is_none(make_llava: Make, make_inputs: Make) -> None:
    model, inputs = make_llava(), make_inputs("left")
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad():
        intact = model(**inputs).logits
    with torch.no_grad(), replay(model, [1], behind(tokens)) as since:
        fail = decoder_layers(find_decoder(model))[2].mlp.register_forward_hook(lambda *_: 1 / 0)
        others = inputs["input_ids"].where(inputs["input_ids"] == 63, 5)
        with pytest.raises(ZeroDivisionError):
            model(**inputs | {"input_ids": others})
        fail.remove()
        with since(1):
            assert torch.equal(model(**inputs).logits, intact), "whole"
        with since(1):
            torch.testing.assert_close(model(**inputs).logits, intact, atol=1e-5, rtol=1e-5)


@given(st.integers(1, 6), st.data())
def test_closure(length: int, data: st.DataObject) -> None:
    """All that reach one of the rows along what they see: by powers of the matrix."""
    bits = st.lists(st.booleans(), min_size=length, max_size=length)
    sees = torch.tensor(data.draw(st.lists(bits, min_size=length, max_size=length)))
    rows = torch.tensor(data.draw(bits))
    reach = torch.linalg.matrix_power(sees.double() + torch.eye(length), length)
    assert torch.equal(_closure(rows[None], sees[None])[0], (reach @ rows.double()) > 0)
