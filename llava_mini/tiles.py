"""High resolution: an image cut into tiles, and the tiles' features stitched into one grid (LLaVA-Mini-HD).

The order of the official training code is to pad the whole image to a square and then cut it:
`cut(pad_to_square(to_rgb(image), colour), tiles)`. Its inference scripts cut first and pad every tile, which differs
for images that are not square.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from .images import pad_to_square, to_rgb


def cut(image: Image.Image, tiles: int) -> list[Image.Image]:
    """`tiles` x `tiles` crops in row-major order, and after them the whole image (LLaVA-Mini-HD: `tiles` = 2).

    As in the official `split_image`, each crop is floor(width / tiles) x floor(height / tiles): pixels that are left
    over at the right and the bottom are seen in the whole image only. A side of fewer pixels than `tiles` gives crops
    of one pixel, of which the last ones are the same. `tiles` = 1 gives the whole image alone.

    Raises:
        ValueError: If `tiles` is not an integer of at least 1.
    """
    if not isinstance(tiles, int) or tiles < 1:
        raise ValueError(f"tiles must be an integer of at least 1; got {tiles!r}")
    if tiles == 1:
        return [image]
    width, height = max(image.width // tiles, 1), max(image.height // tiles, 1)
    lefts = [min(column * width, image.width - width) for column in range(tiles)]
    tops = [min(row * height, image.height - height) for row in range(tiles)]
    return [image.crop((left, top, left + width, top + height)) for top in tops for left in lefts] + [image]


def stitch(features: Float[Tensor, "frames parts patches width"], tiles: int) -> Float[Tensor, "frames grid width"]:
    """The tiles' patches re-ordered to one row-major grid over the image: the compressor's input of LLaVA-Mini-HD.

    Args:
        features: Of `tiles` x `tiles` tiles in row-major order, without the whole image; each of side x side patches
            in row-major order.
        tiles: Tiles along a side.

    Returns:
        The same features; patch (row, column) of the image, on a grid of tiles * side a side, is at index
        row * tiles * side + column.

    Raises:
        ValueError: If there are not `tiles` x `tiles` tiles, or if a tile's patches form no square.
    """
    frames, parts, patches, width = features.shape
    side = math.isqrt(patches)
    if parts != tiles**2 or patches != side**2:
        raise ValueError(
            f"expected {tiles} x {tiles} tiles of a square grid of patches; got {parts} tiles of {patches} patches"
        )
    grid = features.reshape(frames, tiles, tiles, side, side, width)  # frame, tile row, tile column, row, column, width
    return grid.transpose(2, 3).reshape(frames, parts * patches, width)


__all__ = ["cut", "pad_to_square", "stitch", "to_rgb"]
