"""Geometry of image processors."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probes.tokens.image_transform import ProcessedImage, resample_edges


@given(st.integers(1, 12), st.integers(1, 12))
def test_resample_edges_of_even_cells_returns_even_shares(cells: int, count: int) -> None:
    cuts = torch.arange(cells + 1).double() * 3
    shares = resample_edges(torch.stack([cuts[:-1], cuts[1:]], -1), count)
    even = torch.linspace(0, cells * 3, count + 1, dtype=torch.float64)
    torch.testing.assert_close(shares, torch.stack([even[:-1], even[1:]], -1))


def test_resample_edges_with_gap_between_cells_excludes_gap() -> None:
    edges = torch.tensor([[0, 4], [4, 8], [10, 14], [14, 18]]).double()
    assert resample_edges(edges, 2).tolist() == [[0, 8], [10, 18]]
    assert resample_edges(edges, 4).tolist() == edges.tolist()
    assert resample_edges(edges, 1).tolist() == [[0, 18]]


@pytest.mark.parametrize(("cells", "count"), [(30, 22), (45, 33), (7, 5), (5, 5)])
def test_resample_edges_with_gaps_equals_exact_fractions(cells: int, count: int) -> None:
    """If a share ends between two cells, floating-point error must not extend it into either cell."""
    edges = torch.stack([torch.arange(cells) * 10.0, torch.arange(cells) * 10.0 + 8], -1).double()
    cuts = [Fraction(share * cells, count) for share in range(count + 1)]
    expected = [
        [10 * math.floor(a) + 8 * (a - math.floor(a)), 10 * (math.ceil(b) - 1) + 8 * (b - math.ceil(b) + 1)]
        for a, b in pairwise(cuts)
    ]
    torch.testing.assert_close(
        resample_edges(edges, count), torch.tensor([[float(x) for x in row] for row in expected]).double()
    )


def test_process_with_unknown_size_format_returns_no_box() -> None:
    class Processor:
        do_resize, size = True, {"longest_edge": 30}

    assert math.isnan(ProcessedImage.original(10, 20).process(Processor()).box[0])
