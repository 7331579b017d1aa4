"""C-Abstractor: residual convolutions, pooling to C x C, residual convolutions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization as init

from . import Compressor, grid_side, register, vision_grid_side
from .average import pooling_weights
from .position_tables import resize_table

if TYPE_CHECKING:
    from transformers import LlavaConfig


@register("conv")
class ConvCompressor(Compressor):
    """Convolve the patches, pool them to C x C and convolve again: the C-Abstractor of Honeybee.

    Source: arXiv 2312.06742; kakaobrain/honeybee.

    ```
    tokens = W g(pool(f(X + P))) + b
    ```

    P is a learned position table, f and g are three RegNet blocks each ([`ResidualBlock`]), and pool is adaptive average
    pooling to C x C. For an image in tiles P is resized.

    The depth is the published one; the blocks have the width of the features. W is one linear map where the published
    code has two layers, because the projector follows.

    The weights are those of the pooling. They leave out that the convolutions before it mix in patches from outside a
    cell.

    Shapes:
        features (batch, S * S, width) -> tokens (batch, C * C, width), weights (batch, C * C, S * S)

    Raises:
        ValueError: If the patches form no square grid, or one smaller than C x C.
    """

    depth = 3

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        width = config.compressor_width
        self.pos_embed = nn.Parameter(torch.empty(vision_grid_side(config) ** 2, width))
        self.before = nn.Sequential(*(ResidualBlock(width) for _ in range(self.depth)))
        self.after = nn.Sequential(*(ResidualBlock(width) for _ in range(self.depth)))
        self.readout = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.pos_embed, std=0.02)

    def forward(
        self, features: Float[Tensor, "batch patches width"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        side, weights = grid_side(features.shape[1]), pooling_weights(self.size, features)
        grid = (features + resize_table(self.pos_embed, side)).transpose(1, 2).unflatten(2, (side, side))
        pooled = weights @ self.before(grid).flatten(2).transpose(1, 2)  # (batch, tokens, width)
        tokens = self.after(pooled.transpose(1, 2).unflatten(2, (self.size, self.size)))
        return self.readout(tokens.flatten(2).transpose(1, 2)), weights.expand(features.shape[0], -1, -1)


class ResidualBlock(nn.Module):
    """Apply the RegNet block (arXiv 2003.13678) in Honeybee's setting: SiLU(x + h(x)).

    h is a 1 x 1 convolution, a depthwise 3 x 3 convolution, squeeze and excitation to a quarter of the width, and a
    1 x 1 convolution. A layer norm over the channels follows each convolution.
    """

    def __init__(self, width: int):
        super().__init__()
        squeezed = round(width / 4)
        self.mix = nn.Sequential(
            nn.Conv2d(width, width, 1, bias=False),
            ChannelLayerNorm(width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
            ChannelLayerNorm(width),
            nn.SiLU(),
        )
        self.gate = nn.Sequential(nn.Conv2d(width, squeezed, 1), nn.SiLU(), nn.Conv2d(squeezed, width, 1), nn.Sigmoid())
        self.out = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), ChannelLayerNorm(width))

    def forward(self, grid: Float[Tensor, "batch width rows columns"]) -> Float[Tensor, "batch width rows columns"]:
        mixed = self.mix(grid)
        return nn.functional.silu(grid + self.out(mixed * self.gate(mixed.mean(dim=(2, 3), keepdim=True))))


class ChannelLayerNorm(nn.LayerNorm):
    """Normalise the channels of each position, so neither positions nor images mix."""

    def forward(self, input: Float[Tensor, "batch width rows columns"]) -> Float[Tensor, "batch width rows columns"]:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)
