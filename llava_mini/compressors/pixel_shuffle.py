"""Pixel shuffle: the patches of one block become channels, and a linear map restores the width."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor, nn

from . import Compressor, grid_side, register, vision_grid_side
from .average import pooling_weights

if TYPE_CHECKING:
    from transformers import LlavaConfig


@register("pixel_shuffle")
class PixelShuffleCompressor(Compressor):
    """Concatenate the patches of each block and map them to one token (space to depth).

    Source: InternVL 1.5, arXiv 2404.16821; Idefics3, arXiv 2408.12637.

    ```
    token(i, j) = W [x_1; ...; x_k],  x_1 ... x_k the patches of block (i, j) in row-major order,  k = (S / C)^2
    ```

    S x S is the patch grid. Published models have S / C = 2 or 4. W has (S / C)^2 width^2 weights, so one token of
    CLIP's 24 x 24 patches would take 604 million. As in Idefics3 the map has no bias and no norm; the projector follows.

    W fits the vision tower's own grid only, so images in tiles or of another size are refused. The weights are equal
    over a block; they do not show how strongly W weights a patch.

    Shapes:
        features (batch, S * S, width) -> tokens (batch, C * C, width), weights (batch, C * C, S * S)

    Raises:
        ValueError: If C does not divide S, or the patches form another grid than S x S.
    """

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        self.side = vision_grid_side(config)
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
                f"pixel_shuffle was built for a {self.side} x {self.side} grid of patches, got {side} x {side}; it "
                "takes no images in tiles or of another size"
            )
        blocks = features.unflatten(1, (self.size, side // self.size, self.size, side // self.size))
        tokens = self.linear(blocks.transpose(2, 3).flatten(3).flatten(1, 2))
        return tokens, pooling_weights(self.size, features).expand(features.shape[0], -1, -1)
