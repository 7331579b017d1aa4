"""Removal, onset and knockout curves on every model family, against interventions on whole calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from probes import RemoveTokens, TokenMap, intervene
from probes.fusion.curves import knockout_curve, removal_curve
from probes.fusion.onset import onset_curve
from probes.interventions import BlockAttention
from tests.probes.tokens.families.build import LAYERS, MODEL_FAMILIES, tiny
from tests.probes.tokens.families.test_all import make_inputs


class CurveCase:
    """Model and inputs of a family, with a score of all text positions."""

    def __init__(self, family: str, side: str) -> None:
        self.inputs, self.model = make_inputs(family, side), tiny(family).model()
        self.tokens = TokenMap.from_inputs(self.model, self.inputs)
        self.text = ~self.tokens.mask("pad") & ~self.tokens.mask("vision")

    def score(self, logits: Tensor) -> Tensor:
        return (logits.log_softmax(-1)[..., 5] * self.text).sum(1)

    @torch.no_grad()
    def score_of_whole_call(self, *interventions: Any) -> Tensor:
        with intervene(self.model, self.tokens, *interventions):
            return self.score(self.model(**self.inputs).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_removal_curve_equals_removal_in_whole_calls(family: str, side: str) -> None:
    case = CurveCase(family, side)
    expected = [case.score_of_whole_call(RemoveTokens("vision", range(start, LAYERS))) for start in range(LAYERS + 1)]
    curve = removal_curve(case.model, case.tokens, case.inputs, case.score)
    torch.testing.assert_close(torch.from_numpy(curve), torch.stack(expected), atol=1e-3, rtol=0)
    assert (expected[0] - expected[-1])[[0, 2]].abs().min() > 1e-1, "rows 0 and 2 have images"


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_onset_curve_equals_removal_in_whole_calls(family: str) -> None:
    case = CurveCase(family, "left")
    expected = [case.score_of_whole_call(RemoveTokens("vision", range(end))) for end in range(LAYERS + 1)]
    curve = onset_curve(case.model, case.tokens, case.inputs, case.score)
    torch.testing.assert_close(torch.from_numpy(curve), torch.stack(expected), atol=1e-3, rtol=0)
    assert abs(curve[:, 1] - curve[0, 1]).max() < 1e-3, "row 1 has no image"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_knockout_curve_equals_blocking_in_whole_calls(family: str, side: str) -> None:
    """Equality also holds where images attend to text after them, or text lies between two images."""
    case = CurveCase(family, side)
    expected = [
        case.score_of_whole_call(*(BlockAttention("vision", case.text, [layer]) for layer in layers))
        for layers in ([], [0], [1], [2])
    ]
    curve = knockout_curve(case.model, case.tokens, case.inputs, case.score)
    torch.testing.assert_close(torch.from_numpy(curve), torch.stack(expected), atol=1e-3, rtol=0)
    assert (abs(curve[1:, [0, 2]] - curve[0, [0, 2]]) > 1e-4).all()
    assert (curve[:, 1] == curve[0, 1]).all(), "row 1 has no image"
