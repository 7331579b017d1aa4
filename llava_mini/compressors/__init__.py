"""Compressors turn the patch features of an image into C x C visual tokens.

Each compressor is one class in one file of this folder. It subclasses [`Compressor`] and joins `COMPRESSORS` through
`@register("name")`. This package imports all of its modules, so a new file needs no edit elsewhere.
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
    """Compress the patches of each image to C x C visual tokens; base class of every compressor.

    A subclass is built from a [`LlavaMiniConfig`]. Its features have the width `config.compressor_width`.

    `forward` takes the patch features, and by keyword the inputs that the class attribute `needs` lists:

    - "saliency", (batch, patches): the attention that each patch receives in the vision tower's selected layer, averaged
      over the heads. It comes from the class token, or from all patches on average where there is no class token.
    - "keys", (batch, patches, key_width): the keys of that layer, all heads side by side.
    - "projected", (batch, patches, text_width): the patches after the projector.
    - "text", (batch, length, text_width): raw embeddings of the question, as pre-fusion gets them. They include no
      placeholders, padding or answers.
    - "text_mask", (batch, length): True at the tokens of the text. A row may have none.

    Args:
        config: A configuration whose `compressor_size` is C.

    Example:
        >>> from llava_mini import LlavaMiniConfig
        >>> config = LlavaMiniConfig(compressor="average", compressor_size=2)
        >>> compressor = COMPRESSORS["average"](config)
        >>> tokens, weights = compressor(torch.randn(1, 36, config.compressor_width))
        >>> tuple(tokens.shape), tuple(weights.shape)
        ((1, 4, 1024), (1, 4, 36))
    """

    needs: ClassVar[tuple[str, ...]] = ()
    encodes_small_images: ClassVar[bool] = False
    """Whether the vision tower gets images of C x C patches instead of full resolution."""
    forward: Callable[..., tuple[Tensor, Tensor]]
    """Return the tokens and the weight of each patch in each token.

    Args:
        features: Patch features, (batch, patches, width). The patches form a square grid in row-major order.

    Returns:
        The C x C tokens, (batch, tokens, width), in row-major order where they lie on a grid; and the weights,
        (batch, tokens, patches), whose rows sum to one.
    """

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.size = config.compressor_size

    def reset_parameters(self) -> None:
        """Initialise the parameters of this module itself, not those of its children.

        Subclasses use `transformers.initialization`, whose functions skip parameters that were loaded.
        """


def register(name: str) -> Callable[[CompressorClass], CompressorClass]:
    """Return a class decorator that adds a compressor to `COMPRESSORS`.

    Args:
        name: The name that selects the class in `LlavaMiniConfig(compressor=name)`.

    Raises:
        ValueError: If the name is "none" or another compressor has it.
    """

    def decorator(cls: CompressorClass) -> CompressorClass:
        if name == "none" or name in COMPRESSORS:
            raise ValueError(f"the compressor name {name!r} is taken; register the class under another name")
        COMPRESSORS[name] = cls
        return cls

    return decorator


def grid_side(patches: int, size: int = 0) -> int:
    """Return the side of the square grid that the patches form.

    Args:
        patches: Number of patches.
        size: C of a compressor that makes at most one token per patch; 0 skips this check.

    Raises:
        ValueError: If the patches form no square, or a square of a side below `size`.

    Example:
        >>> grid_side(576)
        24
    """
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(
            f"a compressor needs a square grid of patches, got {patches}; "
            "does vision_feature_select_strategy drop the CLS token exactly where the vision tower has one?"
        )
    if size > side:
        raise ValueError(f"compressor_size={size} exceeds the {side} x {side} grid of patches")
    return side


def vision_grid_side(config: LlavaConfig) -> int:
    """Return the side of the vision tower's patch grid.

    An image in T x T tiles has a grid of T times this side.
    """
    vision: Any = config.vision_config
    return vision.image_size // vision.patch_size


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
