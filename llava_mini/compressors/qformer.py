"""Q-Former: learned queries attend to each other and to the patches, in several layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization as init

from . import Compressor, grid_side, register
from .attention import MultiHeadAttention

if TYPE_CHECKING:
    from transformers import LlavaConfig


@register("qformer")
class QFormerCompressor(Compressor):
    """Pass C x C learned queries through the layers of BLIP-2's Q-Former, without its text half.

    Source: BLIP-2, arXiv 2301.12597; salesforce/LAVIS.

    ```
    T_0 = LN(Q),  T_l = QFormerLayer(T_{l-1}, LN(X)),  tokens = T_2
    ```

    Q are the learned queries, X the patches; [`QFormerLayer`] has the formula of a layer.

    Departures: there are two layers with cross-attention in both, no dropout, and training starts from scratch. BLIP-2
    has twelve layers that start from BERT, with cross-attention in every second. It trains them on two objectives of
    their own before the language model gets their tokens.

    The weights are the cross-attention of the last layer, averaged over the heads. They leave out patches that reached
    a query in an earlier layer or through another query.

    Shapes:
        features (batch, S * S, width) -> tokens (batch, C * C, width), weights (batch, C * C, S * S)

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
    """Apply self-attention, cross-attention and a feed-forward part, each with a residual connection and a norm.

    ```
    T <- LN(T + SelfAttention(T));  T <- LN(T + CrossAttention(T, X));  T <- LN(T + W_2 GELU(W_1 T))
    ```

    The feed-forward part has four times the width. The layer equals `nn.TransformerDecoderLayer` and has its parameter
    names. In addition it returns the weights of the cross-attention, which torch's layer does not give out.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.self_attn, self.multihead_attn = MultiHeadAttention(width, heads), MultiHeadAttention(width, heads)
        self.linear1, self.linear2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(
        self, tokens: Float[Tensor, "batch tokens width"], patches: Float[Tensor, "batch patches width"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        tokens = self.norm1(tokens + self.self_attn(tokens, tokens, tokens)[0])
        attended, weights = self.multihead_attn(tokens, patches, patches)
        tokens = self.norm2(tokens + attended)
        return self.norm3(tokens + self.linear2(nn.functional.gelu(self.linear1(tokens)))), weights
