"""Attention of learned queries to patches, with the weights that compressors return."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import initialization as init


class BareAttention(nn.Module):
    """Compute softmax(Q K^T) V with one head, unscaled and without parameters (LLaVA-Mini, equation 2)."""

    scale = 1.0

    def split(self, query: Tensor, key: Tensor, value: Tensor) -> list[Float[Tensor, "batch heads positions width"]]:
        """Return query, key and value, each split into heads."""
        return [x[:, None] for x in (query, key, value)]

    def merge(self, mixed: Float[Tensor, "batch heads tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """Merge the outputs of the heads into one tensor."""
        return mixed[:, 0]

    def forward(
        self,
        query: Float[Tensor, "batch tokens width"],
        key: Float[Tensor, "batch patches width"],
        value: Float[Tensor, "batch patches width"],
        allowed: Bool[Tensor, "tokens patches"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        """Return the output and the attention weights, averaged over the heads.

        Args:
            query: One query for each token.
            key: One key for each patch.
            value: One value for each patch.
            allowed: True where a token may attend to a patch, at least once for each token. None allows all patches.
        """
        q, k, v = self.split(query, key, value)
        scores = q @ k.transpose(2, 3) * self.scale
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)  # (batch, heads, tokens, patches)
        return self.merge(weights @ v), weights.mean(dim=1)


class MultiHeadAttention(BareAttention):
    """Compute multi-head attention, with the parameter names of `nn.MultiheadAttention`.

    The official LLaVA-Mini checkpoint has these names. torch's own module reads the weights of its output map without
    calling that map, so accelerate cannot offload them.

    Args:
        width: Width of queries, keys, values and outputs.
        heads: Number of heads (`compressor_heads`).

    Raises:
        ValueError: If `heads` does not divide the width.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"compressor_heads={heads} does not divide the width {width}")
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the input maps, as [`Compressor.reset_parameters`] requires."""
        init.xavier_uniform_(self.in_proj_weight)
        init.zeros_(self.in_proj_bias)

    def split(self, query: Tensor, key: Tensor, value: Tensor) -> list[Float[Tensor, "batch heads positions width"]]:
        maps = zip(self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        return [
            nn.functional.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x, (weight, bias) in zip((query, key, value), maps, strict=True)
        ]

    def merge(self, mixed: Float[Tensor, "batch heads tokens width"]) -> Float[Tensor, "batch tokens width"]:
        return self.out_proj(mixed.transpose(1, 2).flatten(2))
