"""Whether visual tokens are made of the pixels that their places say: by the colours of pictures that are maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from probes import TokenMap
from tests.probes.tokens.families.build import Tiny


def coordinates(width: int, height: int, blue: int = 0) -> np.ndarray:
    """A picture whose red is how far right a pixel is, and whose green how far down: 0 to 255."""
    red = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    green = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width))
    picture = np.stack([red * 255, green * 255, np.full((height, width), blue)], -1)
    return picture.round().astype(np.uint8)


@dataclass(frozen=True)
class Picture:
    """A picture in the tests: its size, and a blue of its own."""

    width: int
    height: int
    blue: int = 0

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(coordinates(self.width, self.height, self.blue))


def seen(family: Tiny, inputs: Any, tokens: TokenMap) -> np.ndarray:
    """Mean colour, 0 to 255, of the pixels that each visual token is made of: `[tokens, 3]`.

    Which pixels these are, the gradient of what enters the language model tells, once the layers of the vision tower
    no longer attend: then a feature has seen its own patches alone.
    """
    model, names = family.model(), [name for name in inputs if name.startswith("pixel_values")]
    for name, module in model.named_modules():
        if family.vision in name and name.endswith(("attn.proj", "self_attn.out_proj", "attention.projection_layer")):
            torch.nn.init.zeros_(module.weight)
    pixels = [inputs[name].clone().requires_grad_() for name in names]
    entered: list[torch.Tensor] = []
    decoder = model.get_decoder()
    decoder.register_forward_pre_hook(lambda _, args, kwargs: entered.append(kwargs["inputs_embeds"]), with_kwargs=True)
    model(**inputs | dict(zip(names, pixels, strict=True)))
    features = entered[0][tokens.mask("vision")].sum(-1)
    one_each = torch.eye(len(features))
    gradients = torch.autograd.grad(features, pixels, one_each, is_grads_batched=True)

    processor = family.processor.image_processor

    def flat(values: torch.Tensor, leading: int) -> torch.Tensor:
        """`[3, pixels]`, from Qwen's patches [patches, 3 * pixels] or from pictures [..., 3, height, width]."""
        if inputs[names[0]].ndim == 2:
            return values.unflatten(-1, (3, -1)).movedim(-2, leading).flatten(leading + 1)
        return values.movedim(-3, leading).flatten(leading + 1)

    colours = torch.cat([flat(values.detach(), 0) for values in pixels], 1)
    colours = colours * torch.tensor(processor.image_std)[:, None] + torch.tensor(processor.image_mean)[:, None]
    of_token = torch.cat([flat(gradient, 1) for gradient in gradients], 2).ne(0).any(1).float()
    return (255 * (of_token @ colours.T) / of_token.sum(1, keepdim=True)).numpy()


def film(width: int, height: int, frames: int, blue: int = 0) -> np.ndarray:
    """Frames whose blue rises by 20: `[frames, height, width, 3]`."""
    return np.stack([coordinates(width, height, blue + 20 * frame) for frame in range(frames)])


def check_boxes(
    family: Tiny, rows: dict[str, Sequence[tuple[int, int]]], side: str = "left", **kwargs: Any
) -> TokenMap:
    """Checks that each visual token is made of the pixels that `places` say, by the colours of the pictures.

    `rows` are a batch: texts, `#` for a picture, with the (width, height) of the pictures of each.
    """
    pictures = [Picture(*size) for sizes in rows.values() for size in sizes]
    pictures = [Picture(one.width, one.height, 20 * index) for index, one in enumerate(pictures)]
    remaining = iter(pictures)
    images = [[next(remaining).image for _ in sizes] for sizes in rows.values()]
    inputs = family(list(rows), images, side, **kwargs)
    flat = [image for row in images for image in row]
    tokens = TokenMap.from_inputs(family.model(), inputs, family.processor, flat)
    places, vision = tokens.require_places(), tokens.mask("vision")

    counts = [len(sizes) for sizes in rows.values()]
    first = torch.tensor([sum(counts[:row]) for row in range(len(rows))])[:, None]
    colours, picture = seen(family, inputs, tokens), (places.image + first)[vision]
    np.testing.assert_allclose(colours[:, 2], 20 * picture, atol=0.1, err_msg="the picture")
    check_centres(colours, tokens, np.array([(one.width, one.height) for one in pictures])[picture])
    return tokens


def check_centres(colours: np.ndarray, tokens: TokenMap, sizes: np.ndarray) -> None:
    """Red and green are at the centre of the box; `sizes` are (width, height) of the picture of each visual token."""
    box = tokens.require_places().box[tokens.mask("vision")].double().numpy()
    # Half a pixel for the rounding of colours to a 255th of the picture.
    np.testing.assert_allclose(colours[:, :2] / 255 * sizes, (box[:, :2] + box[:, 2:]) / 2, atol=0.5)
