"""Test images whose pixels encode their own coordinates."""

from __future__ import annotations

import numpy as np
from PIL import Image


def coordinates(width: int, height: int) -> Image.Image:
    """Make an image with distinct pixels: (x, y) is (x mod 256, y mod 256, x // 256 + 16 * (y // 256))."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x % 256, y % 256, x // 256 + 16 * (y // 256)], axis=-1).astype(np.uint8))
