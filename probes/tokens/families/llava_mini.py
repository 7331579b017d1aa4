"""LLaVA-Mini: compressed tokens in the language model, the patches themselves inside its pre-fusion layers.

The names of the configuration's fields and the order of tokens are those of the package `llava_mini`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PretrainedConfig

from probes.tokens.families.llava import with_class_tokens
from probes.tokens.grid import Grid, family, pixels_of, size_of
from probes.tokens.image_transform import View, edges_of

Sizes = Sequence[tuple[int, int]] | None


@dataclass(frozen=True, eq=False)
class Frame:
    """The grids of an image or of a frame: its patches (those of its tiles stitched), those of the whole frame where it
    is in tiles, and its compressed tokens where it is compressed."""

    patches: Grid
    whole: Grid | None
    compressed: Grid | None


@family("llava_mini")
def llava_mini(config: PretrainedConfig, inputs: Mapping[str, Any], sizes: Sizes, processor: Any) -> list[Grid]:
    """The C x C tokens of every frame, or its patches where nothing is compressed. Where the language model sees both,
    the patches come first, and the compressed tokens count as one more tile.

    A token of the compressor "average" covers the patches of its cell. One of "query" attends to all patches: its box
    is all that they cover, its row and column say which query it is. Of compressors added by others the box is NaN.
    A picture of one frame counts as an image: its box is wrong if it is a video that was not padded to a square.
    """
    grids = []
    for frame in frames_of(config, inputs, sizes, processor):
        if config.keep_patches and frame.compressed:
            grids += [frame.patches, after(frame.patches, frame.compressed)]
        else:
            grids.append(frame.compressed or frame.patches)
    return with_class_tokens(config, inputs, grids) if config.compressor == "none" else grids


@family("llava_mini/prefusion")
def prefusion(config: PretrainedConfig, inputs: Mapping[str, Any], sizes: Sizes, processor: Any) -> list[Grid]:
    """What `stack="prefusion"` of TokenMap says. Tile 0 is the first tile, the whole frame follows the last."""
    grids = []
    for frame in frames_of(config, inputs, sizes, processor):
        grids += [frame.patches, frame.whole] if frame.whole else [frame.patches]
        if frame.compressed and config.prefuse_visual_tokens:
            grids.append(after(grids[-1], frame.compressed))
    return with_class_tokens(config, inputs, grids) if config.compressor == "none" else grids


def after(last: Grid, compressed: Grid) -> Grid:
    """The compressed tokens as the tile that follows the last of a frame's."""
    return replace(compressed, tile=int(torch.as_tensor(last.tile).max()) + 1)


def frames_of(config: PretrainedConfig, inputs: Mapping[str, Any], sizes: Sizes, processor: Any) -> Iterator[Frame]:
    pixels, layout = pixels_of(inputs), inputs.get("visual_layout")
    layout = [[0, 1, 1]] * len(pixels) if layout is None else layout.tolist()
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    for picture, (_, frames, tiles) in enumerate(layout):
        size = size_of(sizes, picture, len(layout))
        if size is None or processor is None:
            parts, whole = [View(side, side)] * tiles**2, View(side, side)
        else:
            parts, whole = crops(View.whole(*size), processor, tiles, side, squash=frames > 1)
        if tiles == 1:
            patches, last = whole.patches(picture, patch), None
        else:
            rows = [parts[row * tiles : (row + 1) * tiles] for row in range(tiles)]
            number = torch.arange(tiles**2).view(tiles, tiles)
            number = number.repeat_interleave(side // patch, 0).repeat_interleave(side // patch, 1)
            patches = Grid(picture, len(number), len(number), tile=number, edges=edges_of(rows, patch))
            last = whole.patches(picture, patch, tile=tiles**2)
        compressed = compress(config, patches)
        for frame in range(frames):
            yield Frame(
                replace(patches, frame=frame),
                last and replace(last, frame=frame),
                compressed and replace(compressed, frame=frame),
            )


def crops(frame: View, processor: Any, tiles: int, side: int, squash: bool) -> tuple[list[View], View]:
    """What the processor's crops show: the tiles row by row, and the whole frame."""
    padded = getattr(processor, "pad_to_square", False)
    if padded:
        frame = frame.pad_to_square()
    height, width = max(frame.height // tiles, 1), max(frame.width // tiles, 1)
    tops = [min(row * height, frame.height - height) for row in range(tiles)]
    lefts = [min(column * width, frame.width - width) for column in range(tiles)]
    views = [frame.crop(left, top, left + width, top + height) for top in tops for left in lefts]
    if squash and not padded:
        views, frame = [view.resize(side, side) for view in views], frame.resize(side, side)
    seen = [view.process(processor.image_processor) for view in [*views, frame]]
    *parts, whole = [view if (view.height, view.width) == (side, side) else View(side, side) for view in seen]
    return parts, whole


def compress(config: PretrainedConfig, patches: Grid) -> Grid | None:
    """The grid that the compressor makes of the patches; None where it makes none."""
    size = config.compressor_size
    if config.compressor == "none" or not size:
        return None
    across, down = patches.spans()
    grid = Grid(patches.picture, size, size)
    if config.compressor == "query":
        (left, right), (top, bottom) = across[[0, -1], [0, 1]].tolist(), down[[0, -1], [0, 1]].tolist()
        return replace(grid, box=(left, top, right, bottom), shared=True)
    if config.compressor == "average":
        return replace(grid, edges=(cells(across, size), cells(down, size)))
    return grid


def cells(edges: Float[Tensor, "patches 2"], count: int) -> Float[Tensor, "count 2"]:
    """Edges of the cells of adaptive pooling, which share patches where `count` does not divide these."""
    cell, patches = torch.arange(count), len(edges)
    return torch.stack([edges[cell * patches // count, 0], edges[-(-(cell + 1) * patches // count) - 1, 1]], -1)
