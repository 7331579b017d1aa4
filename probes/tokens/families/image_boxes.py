"""Pixel boxes of whole images and of their equal tiles."""

from __future__ import annotations

from probes.tokens.grid import NO_BOX, Box
from probes.tokens.model_inputs import ImageSizes, size_of_image


def whole_image_boxes(sizes: ImageSizes, image_count: int) -> list[Box]:
    """Return the box of each whole image, or NO_BOX for each if `sizes` is None.

    Raises:
        ValueError: If `sizes` does not hold `image_count` sizes.
    """
    known_sizes = [size_of_image(sizes, image, image_count) for image in range(image_count)]
    return [NO_BOX if size is None else (0.0, 0.0, float(size[1]), float(size[0])) for size in known_sizes]


def tile_box(image: Box, rows: int, columns: int, tile: int) -> Box:
    """Return the box of one tile of an image that is cut into `rows` x `columns` equal tiles, in reading order."""
    left, top, right, bottom = image
    row, column = divmod(tile, columns)
    across, down = (right - left) / columns, (bottom - top) / rows
    return (left + column * across, top + row * down, left + (column + 1) * across, top + (row + 1) * down)


def closest_tile_boxes(box: Box, count: int) -> list[Box]:
    """Return the boxes of `count` tiles, in the arrangement whose aspect ratio is closest to that of the image."""
    _, _, width, height = box
    shapes = [(count // columns, columns) for columns in range(1, count + 1) if count % columns == 0]
    if not shapes:
        return []
    rows, columns = min(shapes, key=lambda shape: abs(width / height - shape[1] / shape[0]))
    return [tile_box(box, rows, columns, tile) for tile in range(count)]
