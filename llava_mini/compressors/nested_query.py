"""Nested queries: from one training, any number of the first queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization as init

from . import Compressor, grid_side, register
from .query import Attention, resize_table, sincos_table

if TYPE_CHECKING:
    from transformers import LlavaConfig


@register("nested_query")
class NestedQueryCompressor(Compressor):
    """The Matryoshka Query Transformer (MQT-LLaVA, arXiv 2405.19315; gordonhu608/MQT-LLaVA, commit 92c35d0).

    Of M = 256 learned queries Q the first n = C x C are used: Attention(LN(Q + P), LN(P resized), LN(X)), P the fixed
    16 x 16 sine-cosine table. As in the released code, the keys are positions alone: a query looks at the same places
    of every picture. The released code's output map is the projector here.

    In training each picture draws m from 1 ... n and tokens speak of the first m queries only, so that these learn to
    do alone. MQT draws an even m for a whole step and gives the language model m tokens. Here it gets n, whose
    placeholders stand in the text before m is drawn: the first m repeated in turn, so that it sees nothing in training
    that it would not see of m tokens. Evaluation uses all n.

    The parameters do not depend on C. A checkpoint serves every smaller one:
    `from_pretrained(folder, compressor_size=1)`.

    Raises:
        ValueError: If C is over 16, `compressor_heads` does not divide the width, the width is no multiple of 4, or the
            patches form no square grid.
    """

    most = 16

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        if self.size > self.most:
            raise ValueError(
                f"nested_query: compressor_size={self.size} asks for {self.size**2} of {self.most**2} queries; it may "
                f"be at most {self.most}"
            )
        width = config.compressor_width
        self.query = nn.Parameter(torch.empty(self.most**2, width))
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.attn = Attention(width, config.compressor_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.trunc_normal_(self.query, std=0.02)

    def forward(
        self, features: Float[Tensor, "batch patches width"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        batch, tokens = features.shape[0], self.size**2
        table = sincos_table(self.most, features.shape[2]).to(self.query)
        query = self.ln_q(self.query[:tokens] + table[:tokens])
        key = self.ln_k(resize_table(table, grid_side(features.shape[1])))
        # queries and keys are the same for every picture: one row stands for the batch
        read, weights = self.attn(query[None], key[None], self.ln_v(features))
        weights = weights.expand(batch, -1, -1)
        if self.training:
            drawn = torch.randint(1, tokens + 1, (batch, 1, 1), device=features.device)
            place = torch.arange(tokens, device=features.device)[:, None] % drawn  # (batch, tokens, 1)
            read, weights = (x.gather(1, place.expand_as(x)) for x in (read, weights))
        return read, weights
