"""High resolution: an image cut into tiles, and the tiles' features stitched into one grid (LLaVA-Mini-HD).

The order of the official training code is to pad the whole image to a square and then cut it:
`cut(pad_to_square(to_rgb(image), colour), tiles)`. Its inference scripts cut first and pad every tile, which differs
for images that are not square.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

# What Pillow's readers raise on damaged files.
DAMAGE = (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError)


def to_rgb(image: Image.Image | str | os.PathLike[str]) -> Image.Image:
    """The image, or the image file at this path, in RGB.

    Transparency is composited on white. 16-bit grey is scaled to 8 bits. The modes I and F do not say which value is
    white: it is the least of 1 (F only), 255 and 65535 that no pixel exceeds. A file of several frames gives the
    current one, which is the first unless the caller moved on. The orientation noted in EXIF is not applied, as in the
    official code.

    Raises:
        TypeError: If this is neither an image nor a path.
        FileNotFoundError: If no file is at the path.
        ValueError: If the file is damaged, the image has no pixels, or its values or mode have no meaning in RGB.
    """
    if isinstance(image, (str, os.PathLike)):
        path = Path(image)
        if not path.is_file():
            raise FileNotFoundError(f"there is no image file at {path}")
        try:
            opened = Image.open(path)
        except DAMAGE as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
        with opened:
            return to_rgb(opened)
    if not isinstance(image, Image.Image):
        raise TypeError(f"expected a PIL image or the path of one; got {type(image).__name__}")
    name = getattr(image, "filename", "") or "image"
    if 0 in image.size:
        raise ValueError(f"{name} has no pixels: it is {image.width} x {image.height}")
    try:
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            image = to_grey(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except DAMAGE as error:
        raise ValueError(f"{name} (mode {image.mode}) cannot be turned into RGB: {error}") from error


def to_grey(image: Image.Image) -> Image.Image:
    """An image of more than 8 bits a pixel (I;16 and its kin, I, F) in the mode L; see [`to_rgb`]."""
    values = np.asarray(image, dtype=np.float64)
    whites = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    white = next((white for white in whites if values.max() <= white), None)
    if white is None or not values.min() >= 0:
        raise ValueError(f"values must lie in 0..65535; they span {values.min():g}..{values.max():g}")
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """An RGB image centred on a square of its longer side, as the official `expand2square` does.

    Args:
        image: The image; a square one is returned as it is.
        colour: Fills the rest; the official code takes the image processor's mean, `int(mean * 255)` a channel. An odd
            pixel too many goes to the right or the bottom.
    """
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


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
