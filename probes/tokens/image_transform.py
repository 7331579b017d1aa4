"""What an image processor's output shows of the original picture: resizing, cropping and padding followed by a box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probes.tokens.grid import NO_BOX, Box, Edges, Grid


@dataclass(frozen=True)
class View:
    """An array of `height` x `width` pixels that shows the box of the original picture.

    What is cut off makes the box smaller, padding makes it reach beyond the picture, resizing leaves it as it is.
    """

    height: int
    width: int
    box: Box = NO_BOX

    @classmethod
    def whole(cls, height: int, width: int) -> View:
        return cls(height, width, (0.0, 0.0, float(width), float(height)))

    def resize(self, height: int, width: int) -> View:
        return replace(self, height=height, width=width)

    def crop(self, left: int, top: int, right: int, bottom: int) -> View:
        """The part between these edges, in pixels of the view. Beyond its own edges it is padded."""
        x, y, x_end, y_end = self.box
        across, down = (x_end - x) / self.width, (y_end - y) / self.height
        box = (x + left * across, y + top * down, x + right * across, y + bottom * down)
        return View(bottom - top, right - left, box)

    def center_crop(self, height: int, width: int) -> View:
        top, left = (self.height - height) // 2, (self.width - width) // 2
        return self.crop(left, top, left + width, top + height)

    def pad_to_square(self) -> View:
        return self.center_pad(max(self.height, self.width), max(self.height, self.width))

    def center_pad(self, height: int, width: int) -> View:
        top, left = (height - self.height) // 2, (width - self.width) // 2
        return self.crop(-left, -top, width - left, height - top)

    def process(self, image_processor: Any) -> View:
        """As CLIP's, SigLIP's and LLaVA's image processors treat it: padded to a square, resized, cropped at the
        centre, whichever of these are switched on. Without a box where the size is given in another way."""
        view = self
        if getattr(image_processor, "do_pad", None) and hasattr(image_processor, "pad_to_square"):
            view = view.pad_to_square()
        if image_processor.do_resize:
            size = image_processor.size
            shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
            if shortest and not longest:
                short, long = sorted((view.height, view.width))
                long = int(shortest * long / short)
                view = view.resize(*((shortest, long) if view.height <= view.width else (long, shortest)))
            elif size.get("height") and size.get("width"):
                view = view.resize(size["height"], size["width"])
            else:
                return View(view.height, view.width)
        if getattr(image_processor, "do_center_crop", None):
            view = view.center_crop(image_processor.crop_size["height"], image_processor.crop_size["width"])
        return view

    def patches(self, picture: int, patch: int, **fields: Any) -> Grid:
        """The grid of its patches of `patch` x `patch` pixels. What is left over at the right and the bottom is seen by
        no patch. `fields` are those of a Grid."""
        rows, columns = self.height // patch, self.width // patch
        seen = self.crop(0, 0, columns * patch, rows * patch)
        return Grid(picture, rows, columns, seen.box, **fields)


def edges_of(tiles: Sequence[Sequence[View]], patch: int) -> Edges:
    """Left and right of every column, top and bottom of every row, where tiles' patches are stitched to one grid."""
    across = [tile.patches(0, patch).spans()[0] for tile in tiles[0]]
    down = [row[0].patches(0, patch).spans()[1] for row in tiles]
    return torch.cat(across), torch.cat(down)


def resample(edges: Float[Tensor, "cells 2"], count: int) -> Float[Tensor, "count 2"]:
    """Edges of the `count` equal shares that a grid's cells are interpolated to."""
    cuts = torch.linspace(0, len(edges), count + 1, dtype=torch.float64).round(decimals=9)
    first, last = cuts[:-1].floor().long(), cuts[1:].ceil().long() - 1
    size = edges[:, 1] - edges[:, 0]
    start = edges[first, 0] + (cuts[:-1] - first) * size[first]
    return torch.stack([start, edges[last, 0] + (cuts[1:] - last) * size[last]], -1)


def seen(size: tuple[int, int] | None, image_processor: Any, height: int, width: int) -> View:
    """What `height` x `width` pixels show of a picture of that size. Without a box where the size or the image
    processor is not known, or where that would have made another number of pixels of it."""
    if size is None or image_processor is None:
        return View(height, width)
    view = View.whole(*size).process(image_processor)
    return view if (view.height, view.width) == (height, width) else View(height, width)
