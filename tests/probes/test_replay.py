from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from probes.hooks.decoder import decoder_layers, find_decoder
from probes.interventions import BlockAttention, RemoveTokens, intervene
from probes.replay import replay
from probes.tokens.token_map import TokenMap

LAYERS = 3
Make = Callable[..., Any]


@pytest.fixture
def inputs(make_inputs: Make) -> dict[str, torch.Tensor]:
    return make_inputs("left")  # type: ignore[no-any-return]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("start", range(LAYERS))
def test_the_same_to_the_bit(make_llava: Make, inputs: Any, attention: str, start: int) -> None:
    """Whichever of the starts the run goes back to, and whatever is done from there on."""
    model = make_llava(attention)
    tokens = TokenMap.from_inputs(model, inputs)
    later = range(start, LAYERS)
    changes = [
        RemoveTokens("vision", later),
        RemoveTokens("vision", later, how="drop"),
        RemoveTokens("vision", [start]),
        BlockAttention("vision", "instruction", [LAYERS - 1]),
    ]
    with torch.no_grad(), replay(model, range(LAYERS)) as since:
        intact = model(**inputs).logits
        for change in changes:
            with intervene(model, tokens, change):
                expected = model(**inputs).logits
            with since(start), intervene(model, tokens, change):
                found = model(**inputs).logits
            assert torch.equal(found, expected)
            assert not torch.equal(found, intact)


def test_layers_ahead_do_not_run(make_llava: Make, inputs: Any) -> None:
    model = make_llava("sdpa")
    layers = decoder_layers(find_decoder(model))
    ran: list[int] = []
    with ExitStack() as stack, torch.no_grad():
        for number, layer in enumerate(layers):
            stack.callback(layer.mlp.register_forward_hook(lambda *_, number=number: ran.append(number)).remove)
        with replay(model, [0, 1, 2, LAYERS]) as since:
            for start in (2, 1, 2, 0):  # nothing is kept before the first run: it is whole
                with since(start):
                    model(**inputs)
    assert ran == [0, 1, 2, 1, 2, 2, 0, 1, 2]


def test_the_first_run_is_what_is_repeated(make_llava: Make, inputs: Any) -> None:
    model = make_llava("sdpa")
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), replay(model, [1]) as since:
        intact = model(**inputs).logits
        with intervene(model, tokens, RemoveTokens("vision", [0])):
            model(**inputs)
        with since(1):
            assert torch.equal(model(**inputs).logits, intact)


def test_nothing_stays_behind(make_llava: Make, inputs: Any) -> None:
    model = make_llava("sdpa")
    layers = decoder_layers(find_decoder(model))
    layers[0].forward = own = layers[0].forward  # as accelerate has it, where weights are offloaded
    with torch.no_grad(), replay(model, [2]) as since:
        model(**inputs)
        with pytest.raises(RuntimeError, match="stop"), since(2):
            raise RuntimeError("stop")
    assert layers[0].forward is own
    assert all("forward" not in vars(layer) for layer in layers[1:])
    assert not any(layer._forward_hooks for layer in layers)


def test_another_call_and_starts_outside_are_refused(make_llava: Make, inputs: Any) -> None:
    model = make_llava("sdpa")
    alone = {"input_ids": torch.tensor([[1, 2, 3]])}
    with torch.no_grad(), replay(model, [1]) as since:
        model(**inputs)
        with pytest.raises(ValueError, match=r"\[1, 3, 32\] \(batch, length, width\) cannot take up"), since(1):
            model(**alone)
        model(**alone)
    with pytest.raises(ValueError, match=r"layers .4. are outside the model"), replay(model, [4]):
        pass
