"""Pixel shuffle: the patches of one block become channels, and a linear map brings those back to the width."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor, nn

from . import Compressor, configured_side, grid_side, register
from .average import cell_means

if TYPE_CHECKING:
    from transformers import LlavaConfig


@register("pixel_shuffle")
class PixelShuffleCompressor(Compressor):
    """Space to depth and a linear map (InternVL 1.5, arXiv 2404.16821; Idefics3, arXiv 2408.12637).

    Token (i, j) is W [x_1; ...; x_k], the k = (S / C)^2 patches of block (i, j) of the S x S grid in row-major order.
    Published models have S / C = 2 or 4, and W has (S / C)^2 width^2 weights: one token of CLIP's 24 x 24 patches
    would take 604 million. As in Idefics3 the map has no bias and no norm; the projector follows.

    W fits one grid, that of the tower: pictures in tiles or of another size are refused. The weights returned are equal
    over a block; how much of a patch W lets through they do not say.

    Raises:
        ValueError: If C does not divide S, or the patches form another grid than S x S.
    """

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        self.side = configured_side(config)
        if self.side % self.size:
            sizes = ", ".join(str(size) for size in range(1, self.side + 1) if self.side % size == 0)
            raise ValueError(
                f"pixel_shuffle: compressor_size={self.size} does not divide the {self.side} x {self.side} grid of "
                f"patches; it may be {sizes}"
            )
        width = config.compressor_width
        self.linear = nn.Linear((self.side // self.size) ** 2 * width, width, bias=False)

    def forward(
        self, features: Float[Tensor, "batch patches width"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        side = grid_side(features.shape[1])
        if side != self.side:
            raise ValueError(
                f"pixel_shuffle was made for a {self.side} x {self.side} grid of patches, got {side} x {side}: it "
                "takes no pictures in tiles or of another size"
            )
        blocks = features.unflatten(1, (self.size, side // self.size, self.size, side // self.size))
        tokens = self.linear(blocks.transpose(2, 3).flatten(3).flatten(1, 2))
        return tokens, cell_means(self.size, features).expand(features.shape[0], -1, -1)
