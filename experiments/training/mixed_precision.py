"""Training of a half-precision model: its trained weights are in float32 meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def train_in_float32(model: nn.Module) -> Iterator[None]:
    """Hold the trainable weights in float32 inside the block, and in their own dtype again after it.

    bfloat16 has 8 significant bits: an update of less than 1/256 of a weight would be lost, and at a learning rate of 1e-5
    most are. Micikevicius et al. (2018, arXiv:1710.03740) keep such weights in float32; so do the released code's
    DeepSpeed settings. Forward passes inside the block must run in autocast, which computes in bfloat16 all the same.

    Args:
        model: The model; changed in place.

    Example:
        >>> layer = nn.Linear(2, 2).bfloat16()
        >>> with train_in_float32(layer):
        ...     layer.weight.dtype
        torch.float32
        >>> layer.weight.dtype
        torch.bfloat16
    """
    dtypes = {parameter: parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    for parameter in dtypes:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in dtypes.items():
            parameter.data = parameter.data.to(dtype)
