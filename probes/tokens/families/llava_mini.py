"""LLaVA-Mini: compressed tokens in the language model, and the patches inside its pre-fusion layers.

Config field names and token order follow the package `llava_mini`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PretrainedConfig

from probes.tokens.families.llava import add_class_tokens
from probes.tokens.grid import Grid
from probes.tokens.image_transform import ProcessedImage, stitched_edges
from probes.tokens.layout_registry import register_layout
from probes.tokens.model_inputs import ImageSizes, require_pixels, size_of_image


@dataclass(frozen=True, eq=False)
class FrameGrids:
    """Grids of an image or a video frame.

    Attributes:
        patches: Its patches, stitched from all tiles.
        whole: Patches of the whole frame; None if the frame is not cut into tiles.
        compressed: Its compressed tokens; None without compression.
    """

    patches: Grid
    whole: Grid | None
    compressed: Grid | None


@register_layout("llava_mini")
def llava_mini_layout(
    config: PretrainedConfig, inputs: Mapping[str, Any], sizes: ImageSizes, processor: Any
) -> list[Grid]:
    """Return the grids of the language model: the C x C compressed tokens of every frame, or its patches.

    If the language model receives both, the patches come first and the compressed tokens count as one more tile.

    A token of "average" or "downsample" covers the patches of its cell. A token of the "query" compressor attends to
    all patches, so its box covers all of them; its row and column identify the query. Tokens of third-party compressors
    have no box. An input of one frame counts as an image, so the box of a single-frame video that was not padded to a
    square is wrong.
    """
    grids = []
    for frame in frame_grids(config, inputs, sizes, processor):
        if config.keep_patches and frame.compressed:
            grids += [frame.patches, as_next_tile(frame.compressed, frame.patches)]
        else:
            grids.append(frame.compressed or frame.patches)
    return add_class_tokens(config, inputs, grids) if config.compressor == "none" else grids


@register_layout("llava_mini/prefusion")
def llava_mini_prefusion_layout(
    config: PretrainedConfig, inputs: Mapping[str, Any], sizes: ImageSizes, processor: Any
) -> list[Grid] | None:
    """Return the grids of the pre-fusion layers, as TokenMap describes them for `stack="prefusion"`.

    Tile 0 is the first tile. The whole frame follows the last tile, and the compressed tokens follow the whole frame.
    None with the compressor "downsample", which encodes another grid of patches.
    """
    if config.compressor == "downsample":
        return None
    grids = []
    for frame in frame_grids(config, inputs, sizes, processor):
        grids += [frame.patches, frame.whole] if frame.whole else [frame.patches]
        if frame.compressed and config.prefuse_visual_tokens:
            grids.append(as_next_tile(frame.compressed, grids[-1]))
    return add_class_tokens(config, inputs, grids) if config.compressor == "none" else grids


def as_next_tile(compressed: Grid, last: Grid) -> Grid:
    """Return the grid of compressed tokens, numbered as the tile after the tiles of `last`."""
    return replace(compressed, tile=int(torch.as_tensor(last.tile).max()) + 1)


def frame_grids(
    config: PretrainedConfig, inputs: Mapping[str, Any], sizes: ImageSizes, processor: Any
) -> Iterator[FrameGrids]:
    """Yield the grids of every image and video frame of the batch in reading order."""
    pixels, layout = require_pixels(inputs), inputs.get("visual_layout")
    layout = [[0, 1, 1]] * len(pixels) if layout is None else layout.tolist()
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    for image, (_, frame_count, tiles) in enumerate(layout):
        size = size_of_image(sizes, image, len(layout))
        if size is None or processor is None:
            parts, whole = [ProcessedImage(side, side)] * tiles**2, ProcessedImage(side, side)
        else:
            original = ProcessedImage.original(*size)
            parts, whole = process_tiles(original, processor, tiles, side, squash=frame_count > 1)
        if tiles == 1:
            patches, whole_grid = whole.patch_grid(image, patch), None
        else:
            rows = [parts[row * tiles : (row + 1) * tiles] for row in range(tiles)]
            tile = torch.arange(tiles**2).view(tiles, tiles)
            tile = tile.repeat_interleave(side // patch, 0).repeat_interleave(side // patch, 1)
            patches = Grid(image, len(tile), len(tile), tile=tile, edges=stitched_edges(rows, patch))
            whole_grid = whole.patch_grid(image, patch, tile=tiles**2)
        compressed = compressed_grid(config, patches)
        for frame in range(frame_count):
            yield FrameGrids(
                replace(patches, frame=frame),
                whole_grid and replace(whole_grid, frame=frame),
                compressed and replace(compressed, frame=frame),
            )


def process_tiles(
    frame: ProcessedImage, processor: Any, tiles: int, side: int, squash: bool
) -> tuple[list[ProcessedImage], ProcessedImage]:
    """Return the processed tiles row by row, and the processed whole frame.

    Args:
        frame: The unprocessed frame.
        processor: A LlavaMiniProcessor.
        tiles: Tiles along each side.
        side: Input size of the vision tower in pixels.
        squash: Whether the processor resizes to a square before further steps, as it does for videos.
    """
    padded = getattr(processor, "pad_to_square", False)
    if padded:
        frame = frame.pad_to_square()
    height, width = max(frame.height // tiles, 1), max(frame.width // tiles, 1)
    tops = [min(row * height, frame.height - height) for row in range(tiles)]
    lefts = [min(column * width, frame.width - width) for column in range(tiles)]
    crops = [frame.crop(left, top, left + width, top + height) for top in tops for left in lefts]
    if squash and not padded:
        crops, frame = [crop.resize(side, side) for crop in crops], frame.resize(side, side)
    processed = [crop.process(processor.image_processor) for crop in [*crops, frame]]
    *parts, whole = [
        image if (image.height, image.width) == (side, side) else ProcessedImage(side, side) for image in processed
    ]
    return parts, whole


def compressed_grid(config: PretrainedConfig, patches: Grid) -> Grid | None:
    """Return the grid that the compressor makes of the patches, or None without compressed tokens."""
    size = config.compressor_size
    if config.compressor == "none" or not size:
        return None
    across, down = patches.spans()
    grid = Grid(patches.image, size, size)
    if config.compressor == "query":
        (left, right), (top, bottom) = across[[0, -1], [0, 1]].tolist(), down[[0, -1], [0, 1]].tolist()
        return replace(grid, box=(left, top, right, bottom), shared=True)
    if config.compressor in ("average", "downsample"):
        return replace(grid, edges=(pooling_cell_edges(across, size), pooling_cell_edges(down, size)))
    return grid


def pooling_cell_edges(edges: Float[Tensor, "patches 2"], count: int) -> Float[Tensor, "count 2"]:
    """Return the extents of adaptive pooling cells, which share patches if `count` does not divide the patches."""
    cell, patches = torch.arange(count), len(edges)
    return torch.stack([edges[cell * patches // count, 0], edges[-(-(cell + 1) * patches // count) - 1, 1]], -1)
