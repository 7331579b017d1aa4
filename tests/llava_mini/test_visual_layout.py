"""Which pictures belong to which rows, chosen anew and taken in chunks."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_mini.visual_layout import VisualLayout, crops_per_frame


@given(st.data())
def test_selections(data):
    rows = data.draw(st.integers(1, 4))
    pictures = data.draw(
        st.lists(st.tuples(st.integers(0, rows - 1), st.integers(1, 3), st.integers(1, 2)), max_size=5)
    )
    pictures.sort(key=lambda picture: picture[0])
    chosen = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=5))
    layout = VisualLayout(*torch.tensor(pictures, dtype=torch.long).reshape(-1, 3).unbind(dim=1))
    selected, frame = layout.select(torch.tensor(chosen))
    found = torch.stack([selected.row, selected.frames, selected.tiles], dim=1).tolist()
    expected = [[i, n, t] for i, row in enumerate(chosen) for r, n, t in pictures if r == row]
    assert found == expected
    numbers = [(r, k) for r, n, _ in pictures for k in range(n)]
    of_rows = {row: [i for i, (r, _) in enumerate(numbers) if r == row] for row in range(rows)}
    assert frame.tolist() == [i for row in chosen for i in of_rows[row]]


@given(st.data())
def test_chunks_from_a_frame_on(data):
    tiles = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=6))
    first, size = data.draw(st.integers(0, len(tiles))), data.draw(st.integers(1, 4))
    row = torch.zeros(len(tiles), dtype=torch.long)
    layout = VisualLayout(row, torch.ones_like(row), torch.tensor(tiles))
    frames = [torch.full((crops_per_frame(n), 1, 1, 1), float(i)) for i, n in enumerate(tiles)]
    for pixels in (torch.cat(frames), frames, iter(frames)):
        expected = list(range(first, len(tiles)))
        for part, chunk in layout.chunks(pixels, size, first):
            assert len(chunk) == part.stop - part.start <= size
            for frame, crops in zip(range(part.start, part.stop), chunk, strict=True):
                assert frame == expected.pop(0)
                assert torch.equal(crops, frames[frame])
        assert expected == []
