"""Curves on every family, each with its own mask and positions: as interventions on whole calls have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from probes import RemoveTokens, TokenMap, intervene
from probes.fusion.curves import knockout_curve, removal_curve
from probes.interventions import BlockAttention
from tests.probes.tokens.families.build import FAMILIES, LAYERS, tiny
from tests.probes.tokens.families.test_all import make_inputs


class Curves:
    """A family's model, its inputs, and a score of all its text."""

    def __init__(self, family: str, side: str) -> None:
        self.inputs, self.model = make_inputs(family, side), tiny(family).model()
        self.tokens = TokenMap.from_inputs(self.model, self.inputs)
        self.text = ~self.tokens.mask("pad") & ~self.tokens.mask("vision")

    def score(self, logits: Tensor) -> Tensor:
        return (logits.log_softmax(-1)[..., 5] * self.text).sum(1)

    @torch.no_grad()
    def plain(self, *interventions: Any) -> Tensor:
        with intervene(self.model, self.tokens, *interventions):
            return self.score(self.model(**self.inputs).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_removal(family: str, side: str) -> None:
    """As hidden from whole calls."""
    of = Curves(family, side)
    expected = [of.plain(RemoveTokens("vision", range(start, LAYERS))) for start in range(LAYERS + 1)]
    curve = removal_curve(of.model, of.tokens, of.inputs, of.score)
    torch.testing.assert_close(torch.from_numpy(curve), torch.stack(expected), atol=1e-3, rtol=0)
    assert (expected[0] - expected[-1])[[0, 2]].abs().min() > 1e-1, "rows 0 and 2 have pictures"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_knockout(family: str, side: str) -> None:
    """As whole calls, also where pictures see the text behind them, or text lies between two."""
    of = Curves(family, side)
    expected = [of.plain(*(BlockAttention("vision", of.text, [layer]) for layer in cut)) for cut in ([], [0], [1], [2])]
    curve = knockout_curve(of.model, of.tokens, of.inputs, of.score)
    torch.testing.assert_close(torch.from_numpy(curve), torch.stack(expected), atol=1e-3, rtol=0)
    assert (abs(curve[1:, [0, 2]] - curve[0, [0, 2]]) > 1e-4).all()
    assert (curve[:, 1] == curve[0, 1]).all(), "no picture"
