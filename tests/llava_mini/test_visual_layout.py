"""Visual layout: selection of rows, and iteration in chunks of frames."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_mini.visual_layout import VisualLayout, crops_per_frame


@given(st.data())
def test_select_gives_each_row_the_visual_inputs_of_its_source(data):
    rows = data.draw(st.integers(1, 4))
    inputs = data.draw(st.lists(st.tuples(st.integers(0, rows - 1), st.integers(1, 3), st.integers(1, 2)), max_size=5))
    inputs.sort(key=lambda visual_input: visual_input[0])
    chosen = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=5))
    layout = VisualLayout(*torch.tensor(inputs, dtype=torch.long).reshape(-1, 3).unbind(dim=1))
    selected, frame = layout.select(torch.tensor(chosen))
    columns = torch.stack([selected.row, selected.frames, selected.tiles], dim=1).tolist()
    expected = [[i, n, t] for i, row in enumerate(chosen) for r, n, t in inputs if r == row]
    assert columns == expected
    frames = [(r, k) for r, n, _ in inputs for k in range(n)]
    row_frames = {row: [i for i, (r, _) in enumerate(frames) if r == row] for row in range(rows)}
    assert frame.tolist() == [i for row in chosen for i in row_frames[row]]


@given(st.data())
def test_chunks_from_any_first_frame_hold_the_remaining_frames(data):
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
