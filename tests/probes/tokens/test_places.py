"""Grid and Places: image coordinates of the visual tokens of a batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.tokens.grid import Grid
from probes.tokens.places import Places

Token = tuple[int, int, int, int, int, tuple[float, ...]]  # image, frame, tile, row, column, box

grids_of_one_image = st.lists(
    st.builds(
        Grid,
        image=st.just(0),
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


def expected_tokens(grid: Grid) -> list[Token]:
    """Return the coordinates of each token of a grid, computed one by one."""
    left, top, right, bottom = grid.box
    width, height = (right - left) / max(grid.columns, 1), (bottom - top) / grid.rows
    tokens: list[Token] = []
    for row in range(grid.rows):
        for column in range(grid.columns):
            x, y = left + column * width, top + row * height
            tokens.append((grid.image, grid.frame, grid.tile, row, column, (x, y, x + width, y + height)))
        if grid.newline:
            tokens.append((grid.image, grid.frame, grid.tile, row if grid.columns else -1, -1, (math.nan,) * 4))
    return tokens


@settings(max_examples=60)
@given(rows=st.lists(st.lists(grids_of_one_image, max_size=3), min_size=1, max_size=3), data=st.data())
def test_from_grids_with_text_between_tokens_returns_coordinates_of_every_token(
    rows: list[list[list[Grid]]], data: st.DataObject
) -> None:
    flat_grids, expected = [], []
    image = 0
    for row in rows:
        tokens = []
        for image_in_row, grids in enumerate(row):
            numbered = [Grid(**{**vars(grid), "image": image}) for grid in grids]
            flat_grids += numbered
            tokens += [(image_in_row, *token[1:]) for grid in numbered for token in expected_tokens(grid)]
            image += 1
        gaps = data.draw(st.lists(st.integers(0, 1), min_size=len(tokens), max_size=len(tokens)))
        expected.append([x for token, gap in zip(tokens, gaps, strict=True) for x in [*[None] * gap, token]])
    length = max(map(len, expected)) + 1
    vision = torch.tensor([[x is not None for x in row] + [False] * (length - len(row)) for row in expected])
    places = Places.from_grids(vision, flat_grids)
    for number, row in enumerate(expected):
        for position in range(length):
            token = row[position] if position < len(row) else None
            actual = [
                int(getattr(places, name)[number, position]) for name in ("image", "frame", "tile", "row", "column")
            ]
            assert actual == (list(token[:5]) if token else [-1] * 5)
            box = torch.tensor(token[5] if token else [math.nan] * 4)
            torch.testing.assert_close(places.box[number, position], box, equal_nan=True)


def test_from_grids_with_stitched_grid_returns_tile_of_every_token() -> None:
    tile = torch.tensor([[1, 1, 2], [3, 3, 4]])
    edges = torch.tensor([[0, 4], [4, 8], [9, 12]]).double(), torch.tensor([[0, 5], [6, 10]]).double()
    places = Places.from_grids(torch.ones(1, 8).bool(), [Grid(0, 2, 3, tile=tile, newline=True, edges=edges)])
    assert places.tile.tolist() == [[1, 1, 2, 2, 3, 3, 4, 4]], "a newline belongs to the tile before it"
    assert places.box[0, 2].tolist() == [9, 0, 12, 5]
    assert places.box[0, 5].tolist() == [4, 6, 8, 10]
    assert places.box[0, 3].isnan().all()


def test_from_grids_with_shared_grid_returns_whole_box_for_every_token() -> None:
    places = Places.from_grids(torch.ones(1, 4).bool(), [Grid(0, 2, 2, (1.0, 2.0, 3.0, 4.0), shared=True)])
    assert places.box.tolist() == [[[1, 2, 3, 4]] * 4]
    assert places.row.tolist() == [[0, 0, 1, 1]]


def test_from_grids_with_samples_of_several_rows_counts_images_per_sample() -> None:
    """Frames in pre-fusion are such rows: sample 0 has images 0 (of two frames) and 1, sample 1 has image 2."""
    grids = [Grid(0, 1, 2), Grid(0, 1, 2, frame=1), Grid(1, 1, 2), Grid(2, 1, 2)]
    vision = torch.tensor([[True, True, False]] * 4)
    places = Places.from_grids(vision, grids, samples=torch.tensor([0, 0, 0, 1]))
    assert places.image[:, 0].tolist() == [0, 0, 1, 0]
    assert places.frame[:, 0].tolist() == [0, 1, 0, 0]
    with pytest.raises(ValueError, match="image 0 straddle two rows"):
        Places.from_grids(vision, grids)


def test_from_grids_with_mismatched_tokens_raises_value_error() -> None:
    vision = torch.tensor([[True, True], [True, False]])
    with pytest.raises(ValueError, match=r"images have 4 visual tokens.*input_ids hold 3"):
        Places.from_grids(vision, [Grid(0, 2, 2)])
    with pytest.raises(ValueError, match="image 1 straddle two rows"):
        Places.from_grids(vision, [Grid(0, 1, 1), Grid(1, 1, 2)])
    with pytest.raises(ValueError, match=r"images have 0 visual tokens.*input_ids hold 3"):
        Places.from_grids(vision, [])


def test_from_grids_without_visual_tokens_returns_empty_coordinates() -> None:
    places = Places.from_grids(torch.zeros(2, 3).bool(), [])
    assert (places.image == -1).all()


def test_places_indexed_by_rows_returns_these_rows() -> None:
    places = Places.from_grids(torch.ones(2, 4).bool(), [Grid(0, 2, 2), Grid(1, 1, 4)])
    assert torch.equal(places[1:].row, torch.zeros(1, 4).long())
    assert places[1:].box.shape == (1, 4, 4)
