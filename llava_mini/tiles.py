"""Tiles of high-resolution images: cutting an image into them, and stitching their features into one grid.

LLaVA-Mini-HD uses 2 x 2 tiles. The official training code pads the whole image to a square and then cuts it:
`cut_into_tiles(pad_to_square(to_rgb(image), colour), tiles)`. Its inference scripts cut first and pad every tile, which
differs for images that are not square.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from PIL import Image
from torch import Tensor


def cut_into_tiles(image: Image.Image, tiles: int) -> list[Image.Image]:
    """Cut an image into `tiles` x `tiles` crops in row-major order, and append the whole image.

    As in the official `split_image`, each crop is floor(width / tiles) x floor(height / tiles). Remaining pixels at the
    right and at the bottom are in the whole image only. A side of fewer pixels than `tiles` gives crops of one pixel,
    and the last ones repeat.

    Args:
        image: The image.
        tiles: Number of tiles along a side; 1 returns the whole image alone. LLaVA-Mini-HD uses 2.

    Returns:
        The tiles in row-major order, then the whole image.

    Raises:
        ValueError: If `tiles` is not an integer of at least 1.

    Example:
        >>> from llava_mini.tiles import cut_into_tiles
        >>> [crop.size for crop in cut_into_tiles(image, tiles=2)]
        [(24, 24), (24, 24), (24, 24), (24, 24), (48, 48)]
    """
    if not isinstance(tiles, int) or tiles < 1:
        raise ValueError(f"tiles must be an integer of at least 1; got {tiles!r}")
    if tiles == 1:
        return [image]
    width, height = max(image.width // tiles, 1), max(image.height // tiles, 1)
    lefts = [min(column * width, image.width - width) for column in range(tiles)]
    tops = [min(row * height, image.height - height) for row in range(tiles)]
    return [image.crop((left, top, left + width, top + height)) for top in tops for left in lefts] + [image]


def stitch_tiles(
    features: Float[Tensor, "frames tiles patches width"], tiles: int
) -> Float[Tensor, "frames grid width"]:
    """Reorder the patches of all tiles to one row-major grid over the image, the compressor's input in LLaVA-Mini-HD.

    Args:
        features (`torch.Tensor` of shape `(frames, tiles * tiles, side * side, width)`):
            Features of the tiles in row-major order, without those of the whole image. Each tile has side x side
            patches in row-major order.
        tiles (`int`): Number of tiles along a side.

    Returns:
        `torch.Tensor` of shape `(frames, (tiles * side) ** 2, width)`: the same features. Patch (row, column) of the
        image is at index row * tiles * side + column.

    Raises:
        ValueError: If there are not `tiles` x `tiles` tiles, or if a tile's patches do not form a square.

    Example:
        >>> from llava_mini.tiles import stitch_tiles
        >>> stitch_tiles(torch.zeros(1, 4, 36, 8), tiles=2).shape
        torch.Size([1, 144, 8])
    """
    frames, num_tiles, patches, width = features.shape
    side = math.isqrt(patches)
    if num_tiles != tiles**2 or patches != side**2:
        raise ValueError(
            f"expected {tiles} x {tiles} tiles of a square grid of patches; got {num_tiles} tiles of {patches} patches"
        )
    grid = features.reshape(frames, tiles, tiles, side, side, width)  # frame, tile row, tile column, row, column, width
    return grid.transpose(2, 3).reshape(frames, num_tiles * patches, width)


__all__ = ["cut_into_tiles", "stitch_tiles"]
