"""Checks that the boxes of visual tokens match their pixels, on images whose colours encode coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from probes import TokenMap
from tests.probes.tokens.families.build import TinyFamily

# Ends of the names of the output projections of attention in vision towers.
ATTENTION_OUTPUTS = (
    "attn.proj",
    "self_attn.out_proj",
    "self_attn.o_proj",
    "attention.o_proj",
    "attention.projection_layer",
)


def coordinate_pixels(width: int, height: int, blue: int = 0) -> np.ndarray:
    """Return pixels whose red encodes the column and whose green encodes the row, from 0 to 255."""
    red = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    green = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width))
    pixels = np.stack([red * 255, green * 255, np.full((height, width), blue)], -1)
    return pixels.round().astype(np.uint8)


@dataclass(frozen=True)
class CoordinateImage:
    """An image of a given size whose colours encode coordinates, and whose blue identifies it."""

    width: int
    height: int
    blue: int = 0

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(coordinate_pixels(self.width, self.height, self.blue))


def make_video(width: int, height: int, frames: int, blue: int = 0) -> np.ndarray:
    """Return frames whose blue increases by 20 per frame: `[frames, height, width, 3]`."""
    return np.stack([coordinate_pixels(width, height, blue + 20 * frame) for frame in range(frames)])


def pixel_colours(family: TinyFamily, inputs: Any, tokens: TokenMap) -> np.ndarray:
    """Return the mean colour, 0 to 255, of the pixels that each visual token depends on: `[tokens, 3]`.

    The gradient of the language model's input identifies these pixels. Attention in the vision tower is disabled, so
    that a feature depends only on its own patches.
    """
    model, names = family.model(), [name for name in inputs if name.startswith("pixel_values")]
    for name, module in model.named_modules():
        if family.vision in name and name.endswith(ATTENTION_OUTPUTS):
            torch.nn.init.zeros_(getattr(module, "linear", module).weight)
    pixels = [inputs[name].clone().requires_grad_() for name in names]
    embeddings: list[torch.Tensor] = []
    decoder = model.get_decoder()
    decoder.register_forward_pre_hook(
        lambda _, args, kwargs: embeddings.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs | dict(zip(names, pixels, strict=True)))
    features = embeddings[0][tokens.mask("vision")].sum(-1)
    one_hot = torch.eye(len(features))
    gradients = torch.autograd.grad(features, pixels, one_hot, is_grads_batched=True)

    processor = family.processor.image_processor

    def flat(values: torch.Tensor, leading: int) -> torch.Tensor:
        """Return `[3, pixels]` from patches of Qwen or Gemma 4, or from images `[..., 3, height, width]`."""
        if "image_position_ids" in inputs:  # Gemma 4: [images, patches, pixels * 3]
            return values.unflatten(-1, (-1, 3)).movedim(-1, leading).flatten(leading + 1)
        if inputs[names[0]].ndim == 2:
            return values.unflatten(-1, (3, -1)).movedim(-2, leading).flatten(leading + 1)
        return values.movedim(-3, leading).flatten(leading + 1)

    colours = torch.cat([flat(values.detach(), 0) for values in pixels], 1)
    colours = colours * torch.tensor(processor.image_std)[:, None] + torch.tensor(processor.image_mean)[:, None]
    depends = torch.cat([flat(gradient, 1) for gradient in gradients], 2).ne(0).any(1).float()
    return (255 * (depends @ colours.T) / depends.sum(1, keepdim=True)).numpy()


def check_boxes(
    family: TinyFamily, rows: dict[str, Sequence[tuple[int, int]]], side: str = "left", **kwargs: Any
) -> TokenMap:
    """Check that `places` name the pixels that each visual token depends on, and return the token map.

    Args:
        family: The model family.
        rows: Texts of a batch, with `#` for an image, and the (width, height) of the images of each text.
        side: Padding side.
        kwargs: Further arguments of the processor.
    """
    sizes = [size for sizes_of_row in rows.values() for size in sizes_of_row]
    image_iterator = iter([CoordinateImage(*size, blue=20 * index).image for index, size in enumerate(sizes)])
    images = [[next(image_iterator) for _ in sizes_of_row] for sizes_of_row in rows.values()]
    inputs = family(list(rows), images, side, **kwargs)
    flat_images = [image for row in images for image in row]
    tokens = TokenMap.from_inputs(family.model(), inputs, family.processor, flat_images)
    places, vision = tokens.require_places(), tokens.mask("vision")

    counts = [len(sizes_of_row) for sizes_of_row in rows.values()]
    first = torch.tensor([sum(counts[:row]) for row in range(len(rows))])[:, None]
    colours, image_index = pixel_colours(family, inputs, tokens), (places.image + first)[vision]
    np.testing.assert_allclose(colours[:, 2], 20 * image_index, atol=0.1, err_msg="the image")
    check_centres(colours, tokens, np.array(sizes)[image_index])
    return tokens


def check_centres(colours: np.ndarray, tokens: TokenMap, sizes: np.ndarray) -> None:
    """Check that red and green equal the centre of each box.

    Args:
        colours: Mean colour of each visual token `[tokens, 3]`.
        tokens: The token map.
        sizes: (width, height) of the image of each visual token.
    """
    box = tokens.require_places().box[tokens.mask("vision")].double().numpy()
    # The tolerance of half a pixel covers the rounding of colours to 1/255 of the image.
    np.testing.assert_allclose(colours[:, :2] / 255 * sizes, (box[:, :2] + box[:, 2:]) / 2, atol=0.5)
