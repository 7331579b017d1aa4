"""A hash of a model's weights, by which results name the model that they are of."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def weights_hash(model: nn.Module) -> str:
    """Return 16 hex digits that identify the weights of a model.

    Args:
        model: The model. Its parameters and saved buffers count, with their names and types.

    Example:
        >>> weights_hash(model) == weights_hash(mini)
        False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
