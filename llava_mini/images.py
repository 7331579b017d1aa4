"""One image, made ready for the processor: RGB, 8 bits a channel, square."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

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
