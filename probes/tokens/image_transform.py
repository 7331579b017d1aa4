"""Image processor geometry: the box of the original image that survives padding, resizing and cropping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probes.tokens.grid import NO_BOX, Box, Edges, Grid


@dataclass(frozen=True)
class ProcessedImage:
    """Describe an array of `height` x `width` pixels that shows the box of the original image.

    Cropping shrinks the box, padding extends it beyond the image, and resizing keeps it.
    """

    height: int
    width: int
    box: Box = NO_BOX

    @classmethod
    def original(cls, height: int, width: int) -> ProcessedImage:
        """Return the unprocessed image, whose box is the whole image."""
        return cls(height, width, (0.0, 0.0, float(width), float(height)))

    def resize(self, height: int, width: int) -> ProcessedImage:
        """Return the image resized to `height` x `width` pixels."""
        return replace(self, height=height, width=width)

    def crop(self, left: int, top: int, right: int, bottom: int) -> ProcessedImage:
        """Return the part between these edges, in pixels of this array; edges outside the array pad it."""
        x, y, x_end, y_end = self.box
        across, down = (x_end - x) / self.width, (y_end - y) / self.height
        box = (x + left * across, y + top * down, x + right * across, y + bottom * down)
        return ProcessedImage(bottom - top, right - left, box)

    def center_crop(self, height: int, width: int) -> ProcessedImage:
        """Return the central `height` x `width` pixels."""
        top, left = (self.height - height) // 2, (self.width - width) // 2
        return self.crop(left, top, left + width, top + height)

    def pad_to_square(self) -> ProcessedImage:
        """Return the image padded on both sides to its longer side."""
        return self.center_pad(max(self.height, self.width), max(self.height, self.width))

    def center_pad(self, height: int, width: int) -> ProcessedImage:
        """Return the image padded on both sides to `height` x `width` pixels."""
        top, left = (height - self.height) // 2, (width - self.width) // 2
        return self.crop(-left, -top, width - left, height - top)

    def process(self, image_processor: Any) -> ProcessedImage:
        """Apply the steps that a CLIP, SigLIP or LLaVA image processor enables: pad, resize, center-crop.

        Args:
            image_processor: A transformers image processor.

        Returns:
            The processed image, without a box if the processor specifies its size in another format.
        """
        image = self
        if getattr(image_processor, "do_pad", None) and hasattr(image_processor, "pad_to_square"):
            image = image.pad_to_square()
        if image_processor.do_resize:
            size = image_processor.size
            shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
            if shortest and not longest:
                short, long = sorted((image.height, image.width))
                long = int(shortest * long / short)
                image = image.resize(*((shortest, long) if image.height <= image.width else (long, shortest)))
            elif size.get("height") and size.get("width"):
                image = image.resize(size["height"], size["width"])
            else:
                return ProcessedImage(image.height, image.width)
        if getattr(image_processor, "do_center_crop", None):
            image = image.center_crop(image_processor.crop_size["height"], image_processor.crop_size["width"])
        return image

    def patch_grid(self, image: int, patch: int, **fields: Any) -> Grid:
        """Return the grid of patches of `patch` x `patch` pixels.

        Remaining pixels at the right and the bottom belong to no patch.

        Args:
            image: Index of the image in the batch.
            patch: Side of a patch in pixels.
            fields: Further fields of the Grid.
        """
        rows, columns = self.height // patch, self.width // patch
        covered = self.crop(0, 0, columns * patch, rows * patch)
        return Grid(image, rows, columns, covered.box, **fields)


def processed_image(size: tuple[int, int] | None, image_processor: Any, height: int, width: int) -> ProcessedImage:
    """Return the processed image of `height` x `width` pixels made from an original image.

    Args:
        size: (height, width) of the original image, or None if unknown.
        image_processor: The image processor, or None if unknown.
        height, width: Pixels of the actual model input.

    Returns:
        The processed image. It has no box if the size or the image processor is unknown, or if this processor would
        have returned another number of pixels.
    """
    if size is None or image_processor is None:
        return ProcessedImage(height, width)
    image = ProcessedImage.original(*size).process(image_processor)
    return image if (image.height, image.width) == (height, width) else ProcessedImage(height, width)


def stitched_edges(tiles: Sequence[Sequence[ProcessedImage]], patch: int) -> Edges:
    """Return the extent of every column and row of the grid that stitches the patches of all tiles.

    Args:
        tiles: Rows of tiles.
        patch: Side of a patch in pixels.
    """
    across = [tile.patch_grid(0, patch).spans()[0] for tile in tiles[0]]
    down = [row[0].patch_grid(0, patch).spans()[1] for row in tiles]
    return torch.cat(across), torch.cat(down)


def resample_edges(edges: Float[Tensor, "cells 2"], count: int) -> Float[Tensor, "count 2"]:
    """Return the extents of the `count` equal shares that the cells of a grid are interpolated to."""
    cuts = torch.linspace(0, len(edges), count + 1, dtype=torch.float64).round(decimals=9)
    first, last = cuts[:-1].floor().long(), cuts[1:].ceil().long() - 1
    size = edges[:, 1] - edges[:, 0]
    start = edges[first, 0] + (cuts[:-1] - first) * size[first]
    return torch.stack([start, edges[last, 0] + (cuts[1:] - last) * size[last]], -1)
