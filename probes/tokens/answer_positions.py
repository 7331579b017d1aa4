"""Positions that predict the first token of each row's answer."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from probes.tokens.token_map import TokenMap


def answer_positions(tokens: TokenMap) -> Int[Tensor, " batch"]:
    """Return the position before each row's first `response` position, or its last unpadded one without a response.

    Args:
        tokens: Map of the decoder's inputs.

    Returns:
        Positions `[batch]` on the CPU; -1 for a row that starts with its response or is all padding.

    Example:
        >>> answer_positions(tokens).tolist() == [tokens.labels.shape[1] - 1]
        True
    """
    labels = tokens.labels.cpu()
    positions = torch.arange(labels.shape[1]).expand_as(labels)
    pad = labels == tokens.index("pad") if "pad" in tokens.groups else torch.zeros_like(labels, dtype=torch.bool)
    last = positions.masked_fill(pad, -1).amax(1)
    if "response" not in tokens.groups:
        return last
    response = labels == tokens.index("response")
    first_response = positions.masked_fill(~response, labels.shape[1]).amin(1)
    return torch.where(response.any(1), first_response - 1, last)
