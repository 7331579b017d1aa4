from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from probes.tokens.grid import FAMILIES, Grid, Places, family, picture_sizes, pixels_of, reading_order, size_of
from probes.tokens.image_transform import View, resample

Token = tuple[int, int, int, int, int, tuple[float, ...]]  # picture, frame, tile, row, column, box

grids_of_a_picture = st.lists(
    st.builds(
        Grid,
        picture=st.just(0),
        rows=st.integers(1, 3),
        columns=st.integers(0, 4),
        box=st.sampled_from([(0.0, 0.0, 12.0, 6.0), (-2.0, 1.0, 10.0, 9.0)]),
        frame=st.integers(0, 2),
        tile=st.integers(0, 3),
        newline=st.booleans(),
    ).filter(len),
    min_size=1,
    max_size=3,
)


def by_hand(grid: Grid) -> list[Token]:
    """The tokens of a grid, one by one."""
    left, top, right, bottom = grid.box
    wide, high = (right - left) / max(grid.columns, 1), (bottom - top) / grid.rows
    tokens: list[Token] = []
    for row in range(grid.rows):
        for column in range(grid.columns):
            x, y = left + column * wide, top + row * high
            tokens.append((grid.picture, grid.frame, grid.tile, row, column, (x, y, x + wide, y + high)))
        if grid.newline:
            tokens.append((grid.picture, grid.frame, grid.tile, row if grid.columns else -1, -1, (math.nan,) * 4))
    return tokens


@settings(max_examples=60)
@given(rows=st.lists(st.lists(grids_of_a_picture, max_size=3), min_size=1, max_size=3), data=st.data())
def test_tokens_lie_where_they_were_put(rows: list[list[list[Grid]]], data: st.DataObject) -> None:
    """Rows of pictures of grids, with text strewn among the visual tokens."""
    flat, wanted = [], []
    picture = 0
    for row in rows:
        tokens = []
        for number, grids in enumerate(row):
            numbered = [Grid(**{**vars(grid), "picture": picture}) for grid in grids]
            flat += numbered
            tokens += [(number, *token[1:]) for grid in numbered for token in by_hand(grid)]
            picture += 1
        gaps = data.draw(st.lists(st.integers(0, 1), min_size=len(tokens), max_size=len(tokens)))
        wanted.append([x for token, gap in zip(tokens, gaps, strict=True) for x in [*[None] * gap, token]])
    length = max(map(len, wanted)) + 1
    vision = torch.tensor([[x is not None for x in row] + [False] * (length - len(row)) for row in wanted])
    places = Places.lay_out(vision, flat)
    for number, row in enumerate(wanted):
        for position in range(length):
            token = row[position] if position < len(row) else None
            found = [
                int(getattr(places, name)[number, position]) for name in ("image", "frame", "tile", "row", "column")
            ]
            assert found == (list(token[:5]) if token else [-1] * 5)
            box = torch.tensor(token[5] if token else [math.nan] * 4)
            torch.testing.assert_close(places.box[number, position], box, equal_nan=True)


def test_a_stitched_grid_has_a_tile_for_every_token() -> None:
    tile = torch.tensor([[1, 1, 2], [3, 3, 4]])
    edges = torch.tensor([[0, 4], [4, 8], [9, 12]]).double(), torch.tensor([[0, 5], [6, 10]]).double()
    places = Places.lay_out(torch.ones(1, 8).bool(), [Grid(0, 2, 3, tile=tile, newline=True, edges=edges)])
    assert places.tile.tolist() == [[1, 1, 2, 2, 3, 3, 4, 4]], "a newline is of the tile before it"
    assert places.box[0, 2].tolist() == [9, 0, 12, 5]
    assert places.box[0, 5].tolist() == [4, 6, 8, 10]
    assert places.box[0, 3].isnan().all()


def test_shared_tokens_cover_the_whole_box() -> None:
    places = Places.lay_out(torch.ones(1, 4).bool(), [Grid(0, 2, 2, (1.0, 2.0, 3.0, 4.0), shared=True)])
    assert places.box.tolist() == [[[1, 2, 3, 4]] * 4]
    assert places.row.tolist() == [[0, 0, 1, 1]]


def test_rows_of_one_sample_share_their_pictures() -> None:
    """As frames in pre-fusion do: sample 0 has pictures 0 (of two frames) and 1, sample 1 has picture 2."""
    grids = [Grid(0, 1, 2), Grid(0, 1, 2, frame=1), Grid(1, 1, 2), Grid(2, 1, 2)]
    vision = torch.tensor([[True, True, False]] * 4)
    places = Places.lay_out(vision, grids, samples=torch.tensor([0, 0, 0, 1]))
    assert places.image[:, 0].tolist() == [0, 0, 1, 0]
    assert places.frame[:, 0].tolist() == [0, 1, 0, 0]
    with pytest.raises(ValueError, match="picture 0 straddle two rows"):
        Places.lay_out(vision, grids)


def test_what_does_not_fit() -> None:
    vision = torch.tensor([[True, True], [True, False]])
    with pytest.raises(ValueError, match="the pictures have 4 visual tokens, input_ids 3: are they of one call"):
        Places.lay_out(vision, [Grid(0, 2, 2)])
    with pytest.raises(ValueError, match="visual tokens of picture 1 straddle two rows"):
        Places.lay_out(vision, [Grid(0, 1, 1), Grid(1, 1, 2)])
    with pytest.raises(ValueError, match="the pictures have 0 visual tokens, input_ids 3"):
        Places.lay_out(vision, [])
    nothing = Places.lay_out(torch.zeros(2, 3).bool(), [])
    assert (nothing.image == -1).all()


def test_rows_of_places() -> None:
    places = Places.lay_out(torch.ones(2, 4).bool(), [Grid(0, 2, 2), Grid(1, 1, 4)])
    assert torch.equal(places[1:].row, torch.zeros(1, 4).long())
    assert places[1:].box.shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("picture", "size"),
    [
        (Image.new("RGB", (20, 10)), [(10, 20)]),
        (np.zeros((10, 20, 3)), [(10, 20)]),
        (torch.zeros(3, 10, 20), [(10, 20)]),
        (np.zeros((10, 20)), [(10, 20)]),
        (np.zeros((5, 10, 20, 3)), [(10, 20)]),
        ((10, 20), [(10, 20)]),
        ([Image.new("L", (20, 10)), (30, 40)], [(10, 20), (30, 40)]),
        ([], []),
    ],
)
def test_sizes_of_pictures(picture: Any, size: list[tuple[int, int]]) -> None:
    assert picture_sizes({"image_sizes": torch.tensor([[1, 2]])}, [picture]) == size, "images go before image_sizes"


def test_sizes_from_the_inputs() -> None:
    assert picture_sizes({"image_sizes": torch.tensor([[1, 2], [3, 4]])}, None) == [(1, 2), (3, 4)]
    assert picture_sizes({}, None) is None
    with pytest.raises(ValueError, match=r"a picture is a PIL image, an array or \(height, width\); got str"):
        picture_sizes({}, ["cat.png"])
    with pytest.raises(ValueError, match="the inputs hold 3 pictures, but 2 images or image_sizes are given"):
        size_of([(1, 2), (3, 4)], 0, 3)
    with pytest.raises(ValueError, match="input_ids hold visual tokens that the inputs have no pixel_values for"):
        pixels_of({"pixel_values": None})


def test_reading_order() -> None:
    ids = torch.tensor([[7, 7, 8, 8, 8, 0, 7], [0, 0, 8, 0, 7, 7, 7]])
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 0, 1, 1]])
    order = reading_order({"input_ids": ids, "attention_mask": mask}, {7: [2, 1, 2], 8: [3, 1]})
    assert order == [(7, 0), (8, 0), (7, 1), (8, 1), (7, 2)]
    assert reading_order({"input_ids": ids}, {7: [2]}) == [(7, 0)], "what is left over is for lay_out to tell"


def test_a_family_is_registered() -> None:
    before = dict(FAMILIES)
    try:
        layout = family("a", "b")(lambda *arguments: None)
        assert FAMILIES["a"] is FAMILIES["b"] is layout
    finally:
        FAMILIES.clear()
        FAMILIES.update(before)


@given(st.integers(1, 12), st.integers(1, 12))
def test_equal_shares_of_even_cells_are_even(cells: int, count: int) -> None:
    cuts = torch.arange(cells + 1).double() * 3
    shares = resample(torch.stack([cuts[:-1], cuts[1:]], -1), count)
    even = torch.linspace(0, cells * 3, count + 1, dtype=torch.float64)
    torch.testing.assert_close(shares, torch.stack([even[:-1], even[1:]], -1))


def test_shares_begin_after_a_gap_and_end_before_it() -> None:
    edges = torch.tensor([[0, 4], [4, 8], [10, 14], [14, 18]]).double()
    assert resample(edges, 2).tolist() == [[0, 8], [10, 18]]
    assert resample(edges, 4).tolist() == edges.tolist()
    assert resample(edges, 1).tolist() == [[0, 18]]


@pytest.mark.parametrize(("cells", "count"), [(30, 22), (45, 33), (7, 5), (5, 5)])
def test_shares_among_cells_with_gaps(cells: int, count: int) -> None:
    """Against fractions: where a share ends between two cells, floating point must not put it into either."""
    edges = torch.stack([torch.arange(cells) * 10.0, torch.arange(cells) * 10.0 + 8], -1).double()
    cuts = [Fraction(share * cells, count) for share in range(count + 1)]
    wanted = [
        [10 * math.floor(a) + 8 * (a - math.floor(a)), 10 * (math.ceil(b) - 1) + 8 * (b - math.ceil(b) + 1)]
        for a, b in pairwise(cuts)
    ]
    torch.testing.assert_close(
        resample(edges, count), torch.tensor([[float(x) for x in row] for row in wanted]).double()
    )


def test_a_view_of_unknown_making_has_no_box() -> None:
    class Processor:
        do_resize, size = True, {"longest_edge": 30}

    assert math.isnan(View.whole(10, 20).process(Processor()).box[0])
