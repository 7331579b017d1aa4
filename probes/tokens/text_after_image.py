"""The text that can attend to an image."""

from __future__ import annotations

from jaxtyping import Bool
from torch import Tensor

from probes.tokens.token_map import TokenMap


def text_after_image(tokens: TokenMap) -> Bool[Tensor, "batch positions"]:
    """Return the positions of text after the first visual token of their row: no vision, and no padding.

    Args:
        tokens: Map of the inputs.

    Returns:
        Mask `[batch, positions]`; all False in a row without an image.

    Example:
        >>> tokens = TokenMap(torch.tensor([[0, 1, 2, 1], [0, 2, 2, 2]]), groups=("pad", "vision", "text"), generated="text")
        >>> text_after_image(tokens).tolist()
        [[False, False, True, False], [False, False, False, False]]
    """
    vision = tokens.mask("vision")
    text = ~vision & (vision.cumsum(dim=1) > 0)
    return text & ~tokens.mask("pad") if "pad" in tokens.groups else text
