"""Query compression: C x C learned queries attend to the patches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization as init

from . import Compressor, grid_side, register
from .attention import BareAttention, MultiHeadAttention
from .position_tables import resize_table, sincos_table

if TYPE_CHECKING:
    from transformers import LlavaConfig


@register("query")
class QueryCompressor(Compressor):
    """Let C x C learned queries attend to the patches (LLaVA-Mini, arXiv 2501.03895).

    `config.compressor_attention` selects one of two forms:

    ```
    "bare":        tokens = softmax((Q + P_Q)(X + P_X)^T) X
    "multi_head":  tokens = MultiHeadAttention(LN(Q) + P_Q, LN(X) + P_X, LN(X))
    ```

    Q are the learned queries, X the patches, P_Q and P_X their positions. "bare" is equation 2 of the paper, unscaled
    and without further weights. "multi_head" is the `Resampler` of the official code (ictnlp/LLaVA-Mini, commit
    47da113). Its values carry no position; it has no residual connection, feed-forward part or output norm.

    `config.compressor_positions` selects the positions:

    - "query_grid": one C x C table, resized to the patch grid. With C = 1 it is one vector, the same at every patch. The
      table is an ordinary parameter: the official code declares it frozen, but its training turns the gradient on
      again, so trained checkpoints hold a trained table.
    - "own_grid": a fixed table for each grid.

    Shapes:
        features (batch, S * S, width) -> tokens (batch, C * C, width), weights (batch, C * C, S * S)

    Raises:
        ValueError: If `compressor_heads` does not divide the width, the width is no multiple of 4, or the patches form
            no square grid.
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
            self.attn = MultiHeadAttention(width, config.compressor_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.query, std=0.02)
        if self.pos_embed is not None:
            init.copy_(self.pos_embed, sincos_table(self.size, self.pos_embed.shape[1]).to(self.pos_embed))

    def positions(self, side: int) -> tuple[Float[Tensor, "tokens width"], Float[Tensor, "side*side width"]]:
        """Return the positions that are added to the queries, and to the patches of a `side` x `side` grid."""
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
