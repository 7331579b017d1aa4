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
def test_replay_from_start_gives_identical_logits(make_llava: Make, inputs: Any, attention: str, start: int) -> None:
    """The logits equal those of a full run under the same intervention, for any start and any intervention after it."""
    model = make_llava(attention)
    tokens = TokenMap.from_inputs(model, inputs)
    later = range(start, LAYERS)
    changes = [
        RemoveTokens("vision", later),
        RemoveTokens("vision", later, how="drop"),
        RemoveTokens("vision", [start]),
        BlockAttention("vision", "instruction", [LAYERS - 1]),
    ]
    with torch.no_grad(), replay(model, range(LAYERS)) as resume_from:
        intact = model(**inputs).logits
        for change in changes:
            with intervene(model, tokens, change):
                expected = model(**inputs).logits
            with resume_from(start), intervene(model, tokens, change):
                logits = model(**inputs).logits
            assert torch.equal(logits, expected)
            assert not torch.equal(logits, intact)


def test_replay_from_start_skips_layers_before_it(make_llava: Make, inputs: Any) -> None:
    model = make_llava("sdpa")
    layers = decoder_layers(find_decoder(model))
    runs: list[int] = []
    with ExitStack() as stack, torch.no_grad():
        for number, layer in enumerate(layers):
            stack.callback(layer.mlp.register_forward_hook(lambda *_, number=number: runs.append(number)).remove)
        with replay(model, [0, 1, 2, LAYERS]) as resume_from:
            for start in (2, 1, 2, 0):  # the first run is complete, as nothing is stored before it
                with resume_from(start):
                    model(**inputs)
    assert runs == [0, 1, 2, 1, 2, 2, 0, 1, 2]


def test_replay_after_changed_run_repeats_first_run(make_llava: Make, inputs: Any) -> None:
    model = make_llava("sdpa")
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), replay(model, [1]) as resume_from:
        intact = model(**inputs).logits
        with intervene(model, tokens, RemoveTokens("vision", [0])):
            model(**inputs)
        with resume_from(1):
            assert torch.equal(model(**inputs).logits, intact)


def test_replay_after_exception_leaves_layers_unchanged(make_llava: Make, inputs: Any) -> None:
    model = make_llava("sdpa")
    layers = decoder_layers(find_decoder(model))
    layers[0].forward = own_forward = layers[0].forward  # accelerate sets it on the module to offload weights
    with torch.no_grad(), replay(model, [2]) as resume_from:
        model(**inputs)
        with pytest.raises(RuntimeError, match="stop"), resume_from(2):
            raise RuntimeError("stop")
    assert layers[0].forward is own_forward
    assert all("forward" not in vars(layer) for layer in layers[1:])
    assert not any(layer._forward_hooks for layer in layers)


def test_replay_with_other_call_or_start_outside_raises_value_error(make_llava: Make, inputs: Any) -> None:
    model = make_llava("sdpa")
    alone = {"input_ids": torch.tensor([[1, 2, 3]])}
    with torch.no_grad(), replay(model, [1]) as resume_from:
        model(**inputs)
        with pytest.raises(ValueError, match=r"\[1, 3, 32\]"), resume_from(1):
            model(**alone)
        model(**alone)
    with pytest.raises(ValueError, match=r"layers .4. are outside the model"), replay(model, [4]):
        pass
