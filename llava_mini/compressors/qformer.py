"""Q-Former: learned queries that attend to each other and to the patches, over some layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization as init

from . import Compressor, grid_side, register
from .query import Attention

if TYPE_CHECKING:
    from transformers import LlavaConfig


@register("qformer")
class QFormerCompressor(Compressor):
    """The Q-Former of BLIP-2 (arXiv 2301.12597; salesforce/LAVIS) without its text half: C x C learned queries, layer
    norms on queries and patches, then layers of [`QFormerLayer`].

    Two layers, cross-attention in both, no dropout, from scratch. BLIP-2 has twelve layers that start from BERT, with
    cross-attention in every second, and trains them on two objectives of their own before a language model sees them.

    The weights returned are the last layer's cross-attention, averaged over the heads. Patches that reached a query
    before, or through another query, are not in them.

    Raises:
        ValueError: If `compressor_heads` does not divide the width, or the patches form no square grid.
    """

    depth = 2

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        width = config.compressor_width
        self.query = nn.Parameter(torch.empty(self.size**2, width))
        self.ln_q, self.ln_kv = nn.LayerNorm(width), nn.LayerNorm(width)
        self.layers = nn.ModuleList(QFormerLayer(width, config.compressor_heads) for _ in range(self.depth))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.query, std=0.02)

    def forward(
        self, features: Float[Tensor, "batch patches width"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        grid_side(features.shape[1])
        patches = self.ln_kv(features)
        tokens = self.ln_q(self.query).expand(features.shape[0], -1, -1)
        for layer in self.layers:
            tokens, weights = layer(tokens, patches)
        return tokens, weights


class QFormerLayer(nn.Module):
    """Self-attention, cross-attention and a feed-forward part of four times the width with GELU, each added and then
    normed. This is `nn.TransformerDecoderLayer`, whose parameters' names it has, with the weights of its
    cross-attention, which torch's layer keeps to itself."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.self_attn, self.multihead_attn = Attention(width, heads), Attention(width, heads)
        self.linear1, self.linear2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(
        self, tokens: Float[Tensor, "batch tokens width"], patches: Float[Tensor, "batch patches width"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        tokens = self.norm1(tokens + self.self_attn(tokens, tokens, tokens)[0])
        read, weights = self.multihead_attn(tokens, patches, patches)
        tokens = self.norm2(tokens + read)
        return self.norm3(tokens + self.linear2(nn.functional.gelu(self.linear1(tokens)))), weights
