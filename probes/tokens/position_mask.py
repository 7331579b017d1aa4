"""Masks of the positions of a token map, as a user gives them."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from probes.tokens.token_map import TokenMap


def select_positions(tokens: TokenMap, at: str | Bool[Tensor, "batch positions"]) -> Bool[Tensor, "batch positions"]:
    """Return the mask of a group, or the given mask after a check.

    Args:
        tokens: The token map.
        at: A group of the map, or a mask of its positions.

    Raises:
        ValueError: An unknown group, or a mask that is not bool or not of the map's shape.

    Example:
        >>> int(select_positions(tokens, "vision").sum())
        36
    """
    return tokens.mask(at) if isinstance(at, str) else checked_mask(at, list(tokens.labels.shape))


def checked_mask(mask: Any, shape: list[int]) -> Tensor:
    """Return a mask of positions after a check of its type and shape.

    Args:
        mask: What a user gave.
        shape: Rows and positions that it must have.

    Raises:
        ValueError: It is not a tensor of torch.bool of this shape.

    Example:
        >>> checked_mask(torch.ones(1, 2, dtype=torch.bool), [1, 2]).shape
        torch.Size([1, 2])
    """
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"the mask of tokens is a {type(mask).__name__}: it must be a tensor of torch.bool, shape {shape}"
        )
    if mask.dtype != torch.bool or list(mask.shape) != shape:
        raise ValueError(
            f"the mask of tokens is {mask.dtype} of shape {list(mask.shape)}: it must be torch.bool of shape {shape}"
        )
    return mask
