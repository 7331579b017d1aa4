"""The estimates of the fusion depth, through the real probes, on models for which the depth is known."""

from __future__ import annotations

from itertools import combinations

import pytest

from probes.fusion.depth import agreement
from probes.fusion.planted_models import planted
from probes.fusion.validation import (
    LAYER_COUNTS,
    estimate_depths,
    estimate_onset,
    estimate_reading_layers,
    planted_cases,
    validation_table,
)


def check_estimates(layer: int | tuple[int, int] | None, layers: int, width: int) -> None:
    model = planted(layer, layers)
    estimates = estimate_depths(model, width=width)
    assert [depth.kind for depth in estimates] == ["attention", "removal", "knockout", "readout"]
    for depth in estimates:
        if layer is None:
            assert (depth.depth, depth.low, depth.high) == (None, None, None), depth
        else:
            assert (depth.depth, depth.low, depth.high) == (model.reads[-1],) * 3, depth
        assert (depth.layers, depth.reads) == (layers, model.reads), depth
    assert agreement(estimates).apart == ()
    onset, first = estimate_onset(model), model.reads[0] if model.reads else None
    assert (onset.onset, onset.low, onset.high) == (first,) * 3, onset
    assert (onset.layers, onset.reads) == (layers, model.reads), onset
    for reading, own in zip(estimate_reading_layers(model), (model.reads[:1], model.reads[-1:]), strict=True):
        expected = own[0] if own else None
        assert (reading.layer, reading.low, reading.high) == (expected,) * 3, reading
        assert (reading.layers, reading.reads) == (layers, own), reading


@pytest.mark.parametrize(
    ("layers", "layer"), [case for case in planted_cases() if case[0] in (4, 7)] + [(12, 1), (12, 12)]
)
def test_estimate_depths_of_planted_model_equal_planted_layer(layers: int, layer: int | tuple[int, int] | None) -> None:
    check_estimates(layer, layers, width=1)


@pytest.mark.parametrize("layer", [1, 3, 6, (2, 3), (2, 4), (2, 5), (1, 6), None])
def test_estimate_depths_with_wider_windows_equal_planted_layer(layer: int | tuple[int, int] | None) -> None:
    """Some of the pairs share windows."""
    check_estimates(layer, 6, width=3)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize(("layers", "layer"), list(planted_cases()))
def test_estimate_depths_of_all_cases_equal_planted_layer(
    layers: int, layer: int | tuple[int, int] | None, width: int
) -> None:
    check_estimates(layer, layers, width)


@pytest.mark.slow
@pytest.mark.parametrize("pair", combinations(range(1, 9), 2))
def test_estimate_depths_of_all_pairs_equal_planted_layers(pair: tuple[int, int]) -> None:
    check_estimates(pair, 8, width=1)


def test_validation_table_of_three_models_lists_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(LAYER_COUNTS) == list(range(4, 13))
    monkeypatch.setattr("probes.fusion.validation.planted_cases", lambda: [(4, 3), (4, (1, 4)), (4, None)])
    assert list(validation_table())[2:] == [
        f"| 4 | 3 {7 * '| 3, read at 3 '}|",
        f"| 4 | 1, 4 {4 * '| 4, read at 1, 4 '}| 1, read at 1, 4 | 1, read at 1 | 4, read at 4 |",
        f"| 4 | none {7 * '| none '}|",
    ]
