"""DART, SparseVLM and random dropping on every model family, with its own mask, cache and positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from probes import TokenMap
from probes.pruning import dart, random_drop, sparsevlm
from tests.probes.tokens.families.build import MODEL_FAMILIES, tiny
from tests.probes.tokens.families.test_all import make_inputs
from tests.probes.tokens.families.test_dropping import SLIDING_WINDOW_FAMILIES, WHOLE_CALL_FAMILIES

Method = Callable[[Any, TokenMap, Any], AbstractContextManager[Any]]
METHODS: dict[str, Method] = {
    "dart": lambda model, tokens, how: dart(model, tokens, 1, 0.5, how=how),
    "sparsevlm": lambda model, tokens, how: sparsevlm(model, tokens, [1, 2], 0.7, how=how),
    "random_drop": lambda model, tokens, how: random_drop(model, tokens, 1, 0.5, how=how),
}
SHARES = {"dart": [0.5], "sparsevlm": [0.7, 0.49], "random_drop": [0.5]}
# Its residual stream has four parts, so there are no states to compare.
SEVERAL_STREAM_FAMILIES = {"gemma3n"}
every_method = pytest.mark.parametrize("method", METHODS)


def reads_states(method: str) -> bool:
    return method != "random_drop"


@every_method
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_method_keeps_exact_number_alike_by_mask_and_drop(family: str, side: str, method: str) -> None:
    """Rows have 0, 1 and 2 images."""
    inputs, model = make_inputs(family, side), tiny(family).model()
    tokens = TokenMap.from_inputs(model, inputs)
    vision, logits, chosen = tokens.mask("vision"), [], []
    if family in SEVERAL_STREAM_FAMILIES and reads_states(method):
        with pytest.raises(ValueError, match="several residual streams"):
            METHODS[method](model, tokens, "mask").__enter__()
        return
    for how in ("mask",) if family in WHOLE_CALL_FAMILIES else ("mask", "drop"):
        with torch.no_grad(), METHODS[method](model, tokens, how) as receipt:
            logits.append(model(**inputs, use_cache=False).logits)
        chosen.append([effect.chosen for effect in receipt])
    for share, removed in zip(SHARES[method], chosen[0], strict=True):
        assert not (removed & ~vision).any()
        asked = [math.floor(share * int(count) + 1e-6) for count in vision.sum(dim=1)]
        assert (vision & ~removed).sum(dim=1).tolist() == asked
    real = ~tokens.mask("pad")
    for masked, dropped in zip(chosen[0], chosen[-1], strict=True):
        assert torch.equal(masked, dropped)
    torch.testing.assert_close(logits[0][real], logits[-1][real], atol=1e-4, rtol=0)


@every_method
@pytest.mark.parametrize("family", [f for f in MODEL_FAMILIES if f not in WHOLE_CALL_FAMILIES])
def test_method_in_generation_gives_same_steps_by_mask_and_drop(family: str, method: str) -> None:
    """The logits of every cached step; families with a sliding cache generate by mask alone."""
    inputs, model = make_inputs(family, "left"), tiny(family).model()
    tokens = TokenMap.from_inputs(model, inputs)

    def step_logits(how: str) -> torch.Tensor:
        with METHODS[method](model, tokens, how):
            out = model.generate(
                **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        return torch.stack(out.logits)

    masked = step_logits("mask")
    if family in SLIDING_WINDOW_FAMILIES:
        with pytest.raises(ValueError, match="has a DynamicSlidingWindowLayer"):
            step_logits("drop")
    else:
        torch.testing.assert_close(step_logits("drop"), masked, atol=1e-4, rtol=0)
