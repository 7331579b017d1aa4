"""TokenPacker: each cell's mean takes in what the patches of its cell hold in detail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor, nn

from . import Compressor, register
from .average import cell_means
from .query import Attention

if TYPE_CHECKING:
    from transformers import LlavaConfig


@register("token_packer")
class TokenPackerCompressor(Compressor):
    """Region-to-point injection (TokenPacker, arXiv 2407.02392; CircleRadon/TokenPacker).

    The features X are averaged to a coarse point Z for each cell of a C x C grid, which attends to the patches of its
    own cell: Z + Attention(LN(W Z'), LN(f(X)), LN(g(X))), f and g two-layer maps with GELU. With several
    `vision_feature_layer`s X holds them all and Z' is the part of Z that is the last listed layer's, as published; after
    the projector the layers cannot be told apart, and Z' is Z.

    Departures: cells are those of adaptive average pooling, which need not divide the grid and then share patches (the
    published bilinear interpolation is the same mean at a factor of 2); Z is added to the result, which the released
    code hands on alone; its output layers are the projector here.

    The weights returned are those of the attention, averaged over the heads.

    Raises:
        ValueError: If `compressor_heads` does not divide the width, or the patches form no square grid or a smaller one
            than C x C.
    """

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        vision: Any = config.vision_config
        width = config.compressor_width
        self.level: int = vision.hidden_size if config.compress_before_projection else width
        self.query = nn.Linear(self.level, width, bias=False)
        self.key, self.value = (
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(2)
        )
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.attn = Attention(width, config.compressor_heads)

    def forward(
        self, features: Float[Tensor, "batch patches width"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        cells = cell_means(self.size, features)  # (tokens, patches)
        coarse = cells @ features  # (batch, tokens, width)
        query = self.ln_q(self.query(coarse[..., -self.level :]))
        key, value = self.ln_k(self.key(features)), self.ln_v(self.value(features))
        detail, weights = self.attn(query, key, value, allowed=cells > 0)
        return coarse + detail, weights
