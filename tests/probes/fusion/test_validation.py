"""The estimators, through the real probes, on models of which the answer is known."""

from __future__ import annotations

from itertools import combinations

import pytest

from probes.fusion.depth import agreement
from probes.fusion.planted_models import planted
from probes.fusion.validation import LAYERS, estimates, grid, table


def check(layer: int | tuple[int, int] | None, layers: int, width: int) -> None:
    model = planted(layer, layers)
    found = estimates(model, width=width)
    assert [depth.kind for depth in found] == ["attention", "removal", "knockout", "readout"]
    for depth in found:
        if layer is None:
            assert (depth.depth, depth.low, depth.high) == (None, None, None), depth
        else:
            assert (depth.depth, depth.low, depth.high) == (model.reads[-1],) * 3, depth
        assert (depth.layers, depth.reads) == (layers, model.reads), depth
    assert agreement(found).apart == ()


@pytest.mark.parametrize(("layers", "layer"), [cell for cell in grid() if cell[0] in (4, 7)] + [(12, 1), (12, 12)])
def test_every_estimator_finds_what_is_planted(layers: int, layer: int | tuple[int, int] | None) -> None:
    check(layer, layers, width=1)


@pytest.mark.parametrize("layer", [1, 3, 6, (2, 3), (2, 4), (2, 5), (1, 6), None])
def test_wider_windows_find_the_same(layer: int | tuple[int, int] | None) -> None:
    """Also of two layers that share windows."""
    check(layer, 6, width=3)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize(("layers", "layer"), list(grid()))
def test_every_layer_of_every_depth(layers: int, layer: int | tuple[int, int] | None, width: int) -> None:
    check(layer, layers, width)


@pytest.mark.slow
@pytest.mark.parametrize("pair", combinations(range(1, 9), 2))
def test_every_pair_of_layers(pair: tuple[int, int]) -> None:
    check(pair, 8, width=1)


def test_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(LAYERS) == list(range(4, 13))
    monkeypatch.setattr("probes.fusion.validation.grid", lambda: [(4, 3), (4, (1, 4)), (4, None)])
    assert list(table())[2:] == [
        "| 4 | 3 | 3, read at 3 | 3, read at 3 | 3, read at 3 | 3, read at 3 |",
        "| 4 | 1, 4 | 4, read at 1, 4 | 4, read at 1, 4 | 4, read at 1, 4 | 4, read at 1, 4 |",
        "| 4 | none | none | none | none | none |",
    ]
