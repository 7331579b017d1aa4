"""Query-based compression: C x C learned queries attend to the patches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import initialization as init

from . import Compressor, grid_side, register

if TYPE_CHECKING:
    from transformers import LlavaConfig


@register("query")
class QueryCompressor(Compressor):
    """Learned queries that attend to the patches, in one of two forms (`config.compressor_attention`).

    "multi_head" is the `Resampler` of the official code (ictnlp/LLaVA-Mini, commit 47da113): layer norms, heads and
    linear maps; the values carry no position, and there is no residual, feed-forward or output norm. "bare" is the
    paper's equation 2: softmax((Q + PE)(H + PE)^T) H, unscaled, without further weights.

    The positions (`config.compressor_positions`) are a C x C table resized to the patches' grid, which with C = 1 is
    one vector, the same at every patch; or a fixed table for each grid. The first is an ordinary parameter: the official
    code declares it frozen, but its training gives the gradient back, so trained checkpoints hold a trained table.

    Raises:
        ValueError: If `compressor_heads` does not divide the width, or the width is no multiple of 4.
    """

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        width, tokens = config.compressor_width, config.compressor_size**2
        self.query = nn.Parameter(torch.empty(tokens, width))
        self.pos_embed = (
            nn.Parameter(torch.empty(tokens, width)) if config.compressor_positions == "query_grid" else None
        )
        self.ln_q, self.ln_kv, self.attn = nn.Identity(), nn.Identity(), BareAttention()
        if config.compressor_attention == "multi_head":
            self.ln_q = nn.LayerNorm(width, eps=1e-5)
            self.ln_kv = nn.LayerNorm(width, eps=1e-5)
            self.attn = Attention(width, config.compressor_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.query, std=0.02)
        if self.pos_embed is not None:
            init.copy_(self.pos_embed, sincos_table(self.size, self.pos_embed.shape[1]).to(self.pos_embed))

    def positions(self, side: int) -> tuple[Float[Tensor, "tokens width"], Float[Tensor, "side*side width"]]:
        """What is added to the queries and to the patches of a `side` x `side` grid."""
        if self.pos_embed is not None:
            return self.pos_embed, resize_table(self.pos_embed, side)
        width = self.query.shape[1]
        return sincos_table(self.size, width).to(self.query), sincos_table(side, width).to(self.query)

    def forward(
        self, features: Float[Tensor, "batch patches width"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        query_positions, patch_positions = self.positions(grid_side(features.shape[1]))
        patches = self.ln_kv(features)
        query = (self.ln_q(self.query) + query_positions).expand(features.shape[0], -1, -1)  # (batch, tokens, width)
        return self.attn(query, patches + patch_positions, patches)


class BareAttention(nn.Module):
    """softmax(Q K^T) V: one head, unscaled and without weights."""

    scale = 1.0

    def split(self, query: Tensor, key: Tensor, value: Tensor) -> list[Float[Tensor, "batch heads positions width"]]:
        """Query, key and value of each head."""
        return [x[:, None] for x in (query, key, value)]

    def merge(self, mixed: Float[Tensor, "batch heads tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """The heads' outputs as one."""
        return mixed[:, 0]

    def forward(
        self,
        query: Float[Tensor, "batch tokens width"],
        key: Float[Tensor, "batch patches width"],
        value: Float[Tensor, "batch patches width"],
        allowed: Bool[Tensor, "tokens patches"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        """The output, and the attention weights averaged over the heads. A token looks at all patches or at those
        `allowed` to it, of which there must be one."""
        q, k, v = self.split(query, key, value)
        scores = q @ k.transpose(2, 3) * self.scale
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)  # (batch, heads, tokens, patches)
        return self.merge(weights @ v), weights.mean(dim=1)


class Attention(BareAttention):
    """`nn.MultiheadAttention` with its parameters' names, as the official checkpoint has them. torch's own reads its
    output map's weights without calling it, which accelerate cannot follow when it offloads them.

    Raises:
        ValueError: If `heads` (`compressor_heads`) does not divide the width.
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
        """As [`Compressor.reset_parameters`]."""
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


def sincos_table(side: int, width: int) -> Float[Tensor, "side*side width"]:
    """The 2-D sine-cosine position table of MAE for a `side` x `side` grid, row-major.

    The first half of the width encodes the column, the second half the row; each half holds all sines, then all
    cosines, at frequencies 10000^(-4i/width).
    """
    if width % 4:
        raise ValueError(f"a 2-D sine-cosine table needs a width that is a multiple of 4, got {width}")
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (side, width / 2)
    columns, rows = axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=-1).float()


def resize_table(table: Float[Tensor, "tokens width"], side: int) -> Float[Tensor, "side*side width"]:
    """A square position table resampled to `side` x `side`, bicubically and in float32."""
    source = grid_side(table.shape[0])
    if source == side:
        return table
    grid = table.float().T.unflatten(1, (source, source))[None]  # (1, width, source, source)
    grid = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return grid[0].flatten(1).T.to(table.dtype)
