"""Image downsampling: the vision tower encodes a smaller image, which has C x C patches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import register, vision_grid_side
from .average import AverageCompressor

if TYPE_CHECKING:
    from transformers import LlavaConfig


@register("downsample")
class DownsampleCompressor(AverageCompressor):
    """Encode the image at the resolution that gives C x C patches; a control without parameters.

    Source: the downsampling control of VTC-Bench, arXiv 2510.07143.

    ```
    tokens = vision tower(image resized to C p x C p pixels),  p the side of a patch in pixels
    ```

    The model resizes the pixels because of `encodes_small_images`: bicubic with antialiasing, and the vision tower
    interpolates its position embeddings. So the vision tower is cheaper too. The module itself is the identity on the
    C x C grid. Pre-fusion also gets these C x C patches alone.

    An image in tiles is encoded in small tiles of C x C patches each, which are average-pooled to C x C in all.

    Departures: the benchmark resizes images of models that take any resolution. A tower of one resolution has not been
    trained on smaller images.

    Shapes:
        features (batch, S * S, width) -> tokens (batch, C * C, width), weights (batch, C * C, S * S)

    Raises:
        ValueError: If the patches form no square grid, or one smaller than C x C; or if C exceeds the grid of the vision
            tower, which would enlarge the image.
    """

    encodes_small_images = True

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        if self.size > (side := vision_grid_side(config)):
            raise ValueError(f"compressor_size={self.size} exceeds the {side} x {side} grid of patches")
