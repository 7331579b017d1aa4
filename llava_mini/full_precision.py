"""Computations that stay in the precision of their inputs when training runs in autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that autocast does not change its precision.

    Autocast computes matrix products in 16 bits, even of float32 tensors. Patches of nearly equal similarity would then
    change places, and a compressor would choose other patches in training than outside autocast.

    Args:
        function: A function with a tensor among its arguments.

    Example:
        >>> from llava_mini.full_precision import without_autocast
        >>> vectors = torch.randn(3, 2)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     (vectors @ vectors.T).dtype, without_autocast(torch.matmul)(vectors, vectors.T).dtype
        (torch.bfloat16, torch.float32)
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if not torch.amp.is_autocast_available(device):  # such as meta
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


__all__ = ["without_autocast"]
