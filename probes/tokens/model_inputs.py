"""Facts read from the inputs of a model call: original image sizes, pixels, and the reading order of images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

ImageSizes = Sequence[tuple[int, int]] | None  # (height, width) of the original images in reading order


def original_image_sizes(inputs: Mapping[str, Any], images: Sequence[Any] | None) -> list[tuple[int, int]] | None:
    """Return (height, width) of the original images of a batch in reading order, or None if unknown.

    Args:
        inputs: Inputs of the model call; their `image_sizes` are used if `images` is None.
        images: The images, or a list of images per row. An image is a PIL image, an array (height, width, channels) or
            (channels, height, width), an array of a video's frames, or its (height, width).

    Returns:
        One size per image, or None.

    Raises:
        TypeError: If images are no list.
        ValueError: If an image has another type.

    Example:
        >>> original_image_sizes({}, [image, (30, 40)])
        [(48, 48), (30, 40)]
    """
    if images is None:
        sizes = inputs.get("image_sizes")
        return None if sizes is None else [(int(height), int(width)) for height, width in sizes]
    if not isinstance(images, Iterable) or isinstance(images, str):
        raise TypeError(f"images: found a {type(images).__name__}; pass a list of images")
    return [size for image in images for size in _sizes_of(image)]


def size_of_image(sizes: ImageSizes, image: int, image_count: int) -> tuple[int, int] | None:
    """Return the (height, width) of one image, or None if `sizes` is None.

    Raises:
        ValueError: If `sizes` does not hold `image_count` sizes.
    """
    if sizes is None:
        return None
    if len(sizes) != image_count:
        raise ValueError(f"the inputs hold {image_count} images, but {len(sizes)} images or image_sizes are given")
    return sizes[image]


def require_pixels(inputs: Mapping[str, Any], name: str = "pixel_values") -> Any:
    """Return `inputs[name]`.

    Raises:
        ValueError: If it is missing, although the text holds visual tokens for it.
    """
    if inputs.get(name) is None:
        raise ValueError(f"input_ids hold visual tokens but the inputs have no {name}; pass the processor's output")
    return inputs[name]


def reading_order(inputs: Mapping[str, Any], lengths: Mapping[int, Sequence[int]]) -> list[tuple[int, int]]:
    """Return all images and videos of the batch in reading order.

    Args:
        inputs: Inputs of the model call.
        lengths: For each visual token id (of images, of videos), the token count of each of its images in reading
            order.

    Returns:
        For each image its token id, and its index among the images with this id.
    """
    attended = inputs.get("attention_mask")
    ids = inputs["input_ids"] if attended is None else inputs["input_ids"][attended > 0]
    ids = ids[torch.isin(ids, torch.tensor(list(lengths), device=ids.device))].tolist()
    remaining = {token_id: list(enumerate(lengths[token_id])) for token_id in lengths}
    order, position = [], 0
    while position < len(ids) and remaining[ids[position]]:  # `Places.from_grids` reports a mismatch
        index, length = remaining[ids[position]].pop(0)
        order.append((ids[position], index))
        position += length
    return order


def _sizes_of(image: Any) -> list[tuple[int, int]]:
    if isinstance(image, (list, tuple)):
        if len(image) == 2 and all(isinstance(side, int) for side in image):
            return [(image[0], image[1])]
        return [size for part in image for size in _sizes_of(part)]
    if hasattr(image, "shape"):  # an array or a tensor
        shape = tuple(image.shape[1:] if len(image.shape) == 4 else image.shape)
        if len(shape) == 3:
            shape = shape[:2] if shape[2] in (1, 3, 4) else shape[1:]
        if len(shape) == 2:
            return [(int(shape[0]), int(shape[1]))]
    elif hasattr(image, "size"):  # a PIL image
        return [(image.height, image.width)]
    raise ValueError(f"an image has type {type(image).__name__}; pass a PIL image, an array or (height, width)")
