"""Compressors: the patches of an image in, C x C visual tokens out.

A compressor is one file in this folder. It subclasses [`Compressor`] and puts itself into `COMPRESSORS` with
`@register("name")`; every module of the folder is imported, so nothing else has to be edited.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import LlavaConfig

COMPRESSORS: dict[str, type[Compressor]] = {}

CompressorClass = TypeVar("CompressorClass", bound="type[Compressor]")


class Compressor(nn.Module):
    """Base of every compressor; built from a [`LlavaMiniConfig`], works on features of `config.compressor_width`.

    `forward(features)` takes (batch, patches, width) and returns the C x C tokens, (batch, tokens, width), row-major
    where they lie on a grid, and the weight each patch has in each token, (batch, tokens, patches), rows that sum to one.

    `needs` names what `forward` takes besides, by keyword:

    - "saliency", (batch, patches): the attention that each patch gets in the vision tower's selected layer, from the
      class token, or from all patches on average where there is none; the mean over the heads.
    - "keys", (batch, patches, key_width): that layer's keys, all heads side by side.
    - "text", (batch, length, text_width), and "text_mask", (batch, length): raw embeddings of the text that is asked, as
      pre-fusion has it, without placeholders, padding and answers; the mask is True at its tokens. A row may have none.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    forward: Callable[..., tuple[Tensor, Tensor]]

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.size = config.compressor_size

    def reset_parameters(self) -> None:
        """Initialises the parameters that are held by this module itself, not those of its children. Uses
        `transformers.initialization`, whose functions leave loaded parameters alone."""


def register(name: str) -> Callable[[CompressorClass], CompressorClass]:
    """Class decorator that makes a compressor available as `LlavaMiniConfig(compressor=name)`."""

    def decorator(cls: CompressorClass) -> CompressorClass:
        if name == "none" or name in COMPRESSORS:
            raise ValueError(f"the compressor name {name!r} is taken")
        COMPRESSORS[name] = cls
        return cls

    return decorator


def grid_side(patches: int, size: int = 0) -> int:
    """Side of the square grid that `patches` patches form; ValueError if they form none, or one smaller than C = `size`,
    which a compressor gives where it makes no more tokens than there are patches."""
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(
            f"a compressor needs a square grid of patches, got {patches}; "
            "does vision_feature_select_strategy drop the CLS token exactly where the vision tower has one?"
        )
    if size > side:
        raise ValueError(f"compressor_size={size} exceeds the {side} x {side} grid of patches")
    return side


def configured_side(config: LlavaConfig) -> int:
    """Side of the vision tower's grid of patches. A picture in T x T tiles comes as a grid of T times that side."""
    vision: Any = config.vision_config
    return vision.image_size // vision.patch_size


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
