"""C-Abstractor: residual convolutions, pooling to C x C, residual convolutions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization as init

from . import Compressor, configured_side, grid_side, register
from .average import cell_means
from .query import resize_table

if TYPE_CHECKING:
    from transformers import LlavaConfig


@register("conv")
class ConvCompressor(Compressor):
    """The C-Abstractor of Honeybee (arXiv 2312.06742; kakaobrain/honeybee): tokens = W g(pool(f(X + P))) + b.

    P is a learned table of positions, f and g are three RegNet blocks each ([`ResidualBlock`]), pool is adaptive
    average pooling to C x C. Depth as published, the width of the blocks that of the features; W is one linear map
    where the published code has two layers, since the projector follows. For a picture in tiles P is resized.

    The weights returned are those of the pooling. The convolutions ahead of it let patches outside a cell in too, which
    the weights do not say.

    Raises:
        ValueError: If the patches form no square grid or a smaller one than C x C.
    """

    depth = 3

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        width = config.compressor_width
        self.pos_embed = nn.Parameter(torch.empty(configured_side(config) ** 2, width))
        self.before = nn.Sequential(*(ResidualBlock(width) for _ in range(self.depth)))
        self.after = nn.Sequential(*(ResidualBlock(width) for _ in range(self.depth)))
        self.readout = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.pos_embed, std=0.02)

    def forward(
        self, features: Float[Tensor, "batch patches width"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        side, weights = grid_side(features.shape[1]), cell_means(self.size, features)
        grid = (features + resize_table(self.pos_embed, side)).transpose(1, 2).unflatten(2, (side, side))
        pooled = weights @ self.before(grid).flatten(2).transpose(1, 2)  # (batch, tokens, width)
        tokens = self.after(pooled.transpose(1, 2).unflatten(2, (self.size, self.size)))
        return self.readout(tokens.flatten(2).transpose(1, 2)), weights.expand(features.shape[0], -1, -1)


class ResidualBlock(nn.Module):
    """SiLU(x + h(x)), h a 1 x 1 convolution, a 3 x 3 convolution of each channel by itself, squeeze and excitation
    (to a quarter of the width) and a 1 x 1 convolution, each convolution with a layer norm over the channels: the
    RegNet block (arXiv 2003.13678) as Honeybee sets it up."""

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
    """Layer norm over the channels of each place, so that neither places nor pictures mix."""

    def forward(self, input: Float[Tensor, "batch width rows columns"]) -> Float[Tensor, "batch width rows columns"]:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)
