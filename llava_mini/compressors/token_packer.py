"""TokenPacker: the mean of each cell attends to the patches of its cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor, nn

from . import Compressor, register
from .attention import MultiHeadAttention
from .average import pooling_weights

if TYPE_CHECKING:
    from transformers import LlavaConfig


@register("token_packer")
class TokenPackerCompressor(Compressor):
    """Average each cell of a C x C grid and add the detail of its patches (region-to-point injection).

    Source: TokenPacker, arXiv 2407.02392; CircleRadon/TokenPacker.

    ```
    tokens = Z + MultiHeadAttention(LN(W Z'), LN(f(X)), LN(g(X)))
    ```

    X are the patches, Z the means of the cells, f and g two-layer maps with GELU. Each mean attends to the patches of
    its own cell only. With several `vision_feature_layer`s X holds them all, and Z' is the part of Z from the last
    listed layer, as published. After the projector the layers cannot be told apart, and Z' is Z.

    Departures:

    - Cells are those of adaptive average pooling, which need not divide the grid and then share patches. The published
      bilinear interpolation gives the same mean at a factor of 2.
    - Z is added to the result; the released code returns the detail alone.
    - The projector takes the part of the released code's output layers.

    The weights are those of the attention, averaged over the heads.

    Shapes:
        features (batch, S * S, width) -> tokens (batch, C * C, width), weights (batch, C * C, S * S)

    Raises:
        ValueError: If `compressor_heads` does not divide the width, or the patches form no square grid, or one smaller
            than C x C.
    """

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        vision: Any = config.vision_config
        width = config.compressor_width
        self.query_width: int = vision.hidden_size if config.compress_before_projection else width
        self.query = nn.Linear(self.query_width, width, bias=False)
        self.key, self.value = (
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(2)
        )
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.attn = MultiHeadAttention(width, config.compressor_heads)

    def forward(
        self, features: Float[Tensor, "batch patches width"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        cells = pooling_weights(self.size, features)  # (tokens, patches)
        coarse = cells @ features  # (batch, tokens, width)
        query = self.ln_q(self.query(coarse[..., -self.query_width :]))
        key, value = self.ln_k(self.key(features)), self.ln_v(self.value(features))
        detail, weights = self.attn(query, key, value, allowed=cells > 0)
        return coarse + detail, weights
