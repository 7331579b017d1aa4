"""Nested queries: one training serves any number of the first queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization as init

from . import Compressor, grid_side, register
from .attention import MultiHeadAttention
from .position_tables import resize_table, sincos_table

if TYPE_CHECKING:
    from transformers import LlavaConfig


@register("nested_query")
class NestedQueryCompressor(Compressor):
    """Use the first C x C of 256 learned queries: the Matryoshka Query Transformer.

    Source: MQT-LLaVA, arXiv 2405.19315; gordonhu608/MQT-LLaVA, commit 92c35d0.

    ```
    tokens = MultiHeadAttention(LN(Q[:n] + P[:n]), LN(P resized), LN(X)),  n = C * C
    ```

    Q are M = 256 learned queries, P the fixed 16 x 16 sine-cosine table, X the patches. As in the released code, the
    keys are positions alone: a query attends to the same positions of every image. The projector takes the part of the
    released code's output map.

    In training, a number m is drawn from 1 ... n for each image, and only the first m queries contribute, so these
    learn to work alone. MQT draws an even m for a whole step and passes m tokens to the language model. Here the
    language model gets n tokens, because the text holds n placeholders before m is drawn. The first m tokens repeat in
    turn, so training shows it nothing beyond those m tokens. Evaluation uses all n queries.

    The parameters do not depend on C. One checkpoint serves every smaller size:
    `from_pretrained(folder, compressor_size=1)`.

    Shapes:
        features (batch, S * S, width) -> tokens (batch, C * C, width), weights (batch, C * C, S * S)

    Raises:
        ValueError: If C is over 16, `compressor_heads` does not divide the width, the width is no multiple of 4, or the
            patches form no square grid.
    """

    max_size = 16

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        if self.size > self.max_size:
            raise ValueError(
                f"nested_query: compressor_size={self.size} needs {self.size**2} queries, but there are "
                f"{self.max_size**2}; it may be at most {self.max_size}"
            )
        width = config.compressor_width
        self.query = nn.Parameter(torch.empty(self.max_size**2, width))
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.attn = MultiHeadAttention(width, config.compressor_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.trunc_normal_(self.query, std=0.02)

    def forward(
        self, features: Float[Tensor, "batch patches width"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        batch, tokens = features.shape[0], self.size**2
        table = sincos_table(self.max_size, features.shape[2]).to(self.query)
        query = self.ln_q(self.query[:tokens] + table[:tokens])
        key = self.ln_k(resize_table(table, grid_side(features.shape[1])))
        # Queries and keys are the same for every image, so one row stands for the whole batch.
        output, weights = self.attn(query[None], key[None], self.ln_v(features))
        weights = weights.expand(batch, -1, -1)
        if self.training:
            drawn_counts = torch.randint(1, tokens + 1, (batch, 1, 1), device=features.device)
            # (batch, tokens, 1)
            query_indices = torch.arange(tokens, device=features.device)[:, None] % drawn_counts
            output, weights = (x.gather(1, query_indices.expand_as(x)) for x in (output, weights))
        return output, weights
