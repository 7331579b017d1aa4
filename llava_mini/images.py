"""Preparation of one image for the processor: RGB conversion, 8 bits a channel, padding to a square."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

# Exceptions that Pillow's readers raise on damaged files.
IMAGE_READ_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
    EOFError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
)


def to_rgb(image: Image.Image | str | os.PathLike[str], ignore_orientation: bool = False) -> Image.Image:
    """Convert an image, or the image file at a path, to RGB, and turn it upright.

    Transparent pixels are composited on white. 16-bit grey is scaled to 8 bits. The modes I and F do not define white:
    it is the smallest of 1 (F only), 255 and 65535 that no pixel exceeds. An image file with several frames gives its
    current frame, the first unless the caller moved on.

    Cameras store how an image must be turned or mirrored in its EXIF or XMP data. The returned image has no such entry,
    so a second call does not turn it again.

    Args:
        image: A PIL image or the path of an image file.
        ignore_orientation: Whether to return the pixels as they are stored, as the official code does. Pillow itself
            turns TIFF files, also in the official code.

    Returns:
        The image in mode RGB. Its size is that of the image, with width and height exchanged after a quarter turn.

    Raises:
        TypeError: If `image` is neither a PIL image nor a path.
        FileNotFoundError: If no file exists at the path.
        ValueError: If the file is damaged, the image has no pixels, or its values or mode have no meaning in RGB.

    Example:
        >>> from PIL import Image
        >>> from llava_mini.images import to_rgb
        >>> to_rgb(Image.new("L", (2, 2), 100)).getpixel((0, 0))
        (100, 100, 100)
    """
    if isinstance(image, (str, os.PathLike)):
        path = Path(image)
        if not path.is_file():
            raise FileNotFoundError(f"there is no image file at {path}")
        try:
            opened = Image.open(path)
        except IMAGE_READ_ERRORS as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
        with opened:
            return to_rgb(opened, ignore_orientation)
    if not isinstance(image, Image.Image):
        raise TypeError(f"expected a PIL image or the path of one; got {type(image).__name__}")
    name = getattr(image, "filename", "") or "image"
    if 0 in image.size:
        raise ValueError(f"{name} has no pixels: its size is {image.width} x {image.height}")
    try:
        image.load()  # some formats store the orientation behind the pixels
        if not ignore_orientation and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            image = to_grey(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        converted = image.convert("RGB")
        converted.info = {}  # holds the orientation, which is settled now
        return converted
    except IMAGE_READ_ERRORS as error:
        raise ValueError(f"{name} (mode {image.mode}) cannot be converted to RGB: {error}") from error


def to_grey(image: Image.Image) -> Image.Image:
    """Scale an image of more than 8 bits a pixel (modes I, F, I;16 and its variants) to mode L; see [`to_rgb`].

    Raises:
        ValueError: If a value is negative, above 65535 or not a number.
    """
    values = np.asarray(image, dtype=np.float64)
    possible_whites = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    white = next((white for white in possible_whites if values.max() <= white), None)
    if white is None or not values.min() >= 0:
        raise ValueError(f"values must lie in 0..65535; they span {values.min():g}..{values.max():g}")
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Centre an RGB image on a square as wide as its longer side, as the official `expand2square` does.

    Args:
        image: The image. A square image is returned unchanged.
        colour: Value of the border in each channel. The official code uses the image processor's mean,
            `int(mean * 255)` a channel.

    Returns:
        The square image. An odd border pixel goes to the right or to the bottom.

    Example:
        >>> from PIL import Image
        >>> from llava_mini.images import pad_to_square
        >>> pad_to_square(Image.new("RGB", (4, 2)), colour=(122, 116, 104)).size
        (4, 4)
    """
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


__all__ = ["pad_to_square", "to_grey", "to_rgb"]
