"""What the layouts of several families share: runs of visual tokens, and boxes of pictures and of their tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from probes.places import NO_BOX, Box


class Run(NamedTuple):
    """Consecutive image tokens of one row: positions from `start` to before `stop`."""

    row: int
    start: int
    stop: int


def visual_positions(inputs: Mapping[str, Any], *visual_tokens: int) -> Bool[Tensor, "batch positions"]:
    """Where one of these tokens stands and `attention_mask` does not hide it."""
    input_ids = inputs["input_ids"]
    vision = torch.isin(input_ids, torch.tensor(visual_tokens, device=input_ids.device))
    mask = inputs.get("attention_mask")
    return vision if mask is None else vision & (mask != 0)


def image_runs(inputs: Mapping[str, Any], image_token: int) -> list[Run]:
    """The longest runs of the image token, in reading order."""
    change = torch.nn.functional.pad(visual_positions(inputs, image_token).int(), (1, 1)).diff()
    starts, stops = (change == 1).nonzero().tolist(), (change == -1).nonzero().tolist()
    return [Run(row, start, stop) for (row, start), (_, stop) in zip(starts, stops, strict=True)]


def whole_boxes(sizes: Sequence[tuple[int, int]] | None, pictures: int) -> list[Box]:
    """All of each picture, or NO_BOX where the sizes are not known. Raises ValueError for another number of sizes."""
    if sizes is None:
        return [NO_BOX] * pictures
    if len(sizes) != pictures:
        raise ValueError(f"{len(sizes)} pictures were given, input_ids hold {pictures}: are they of one call?")
    return [(0.0, 0.0, float(width), float(height)) for height, width in sizes]


def tile_box(picture: Box, rows: int, columns: int, tile: int) -> Box:
    """Of a picture cut into rows and columns of equal tiles, the `tile`th in reading order."""
    left, top, right, bottom = picture
    row, column = divmod(tile, columns)
    across, down = (right - left) / columns, (bottom - top) / rows
    return (left + column * across, top + row * down, left + (column + 1) * across, top + (row + 1) * down)
