"""What the layouts of several families share: runs of visual tokens, and boxes of pictures and of their tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from probes.tokens.grid import NO_BOX, Box, size_of


class Run(NamedTuple):
    """Consecutive image tokens of one row: positions from `start` to before `stop`."""

    row: int
    start: int
    stop: int


def image_runs(inputs: Mapping[str, Any], image_token: int) -> list[Run]:
    """The longest runs of the image token that `attention_mask` does not hide, in reading order."""
    vision = inputs["input_ids"] == image_token
    if inputs.get("attention_mask") is not None:
        vision = vision & (inputs["attention_mask"] != 0)
    change = torch.nn.functional.pad(vision.int(), (1, 1)).diff()
    starts, stops = (change == 1).nonzero().tolist(), (change == -1).nonzero().tolist()
    return [Run(row, start, stop) for (row, start), (_, stop) in zip(starts, stops, strict=True)]


def texts_before(inputs: Mapping[str, Any], runs: Sequence[Run], processor: Any) -> list[str]:
    """What stands between each run and the one before it in its row; nothing before the first of a row, and nowhere
    without a processor, whose tokenizer reads it."""
    texts = [""] * len(runs)
    for number, (before, run) in enumerate(pairwise(runs), start=1):
        if processor is not None and before.row == run.row:
            texts[number] = processor.tokenizer.decode(inputs["input_ids"][run.row, before.stop : run.start])
    return texts


def whole_boxes(sizes: Sequence[tuple[int, int]] | None, pictures: int) -> list[Box]:
    """All of each picture, or NO_BOX where the sizes are not known. Raises ValueError for another number of sizes."""
    known = [size_of(sizes, picture, pictures) for picture in range(pictures)]
    return [NO_BOX if size is None else (0.0, 0.0, float(size[1]), float(size[0])) for size in known]


def tile_box(picture: Box, rows: int, columns: int, tile: int) -> Box:
    """Of a picture cut into rows and columns of equal tiles, the `tile`th in reading order."""
    left, top, right, bottom = picture
    row, column = divmod(tile, columns)
    across, down = (right - left) / columns, (bottom - top) / rows
    return (left + column * across, top + row * down, left + (column + 1) * across, top + (row + 1) * down)
