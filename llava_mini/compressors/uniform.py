"""Uniform sampling: the patch in the middle of each cell of a C x C grid."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import Compressor, grid_side, register


@register("uniform")
class UniformCompressor(Compressor):
    """Of a grid of S x S patches, those in the rows and columns floor((2i + 1) S / 2C) for i = 0 ... C - 1: a control
    without parameters, one patch at full detail in place of a cell's mean.

    Raises:
        ValueError: If the patches form no square grid or a smaller one than C x C.
    """

    def forward(
        self, features: Float[Tensor, "batch patches width"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        side = grid_side(features.shape[1], self.size)
        return select(features, move(torch.arange(self.size**2, device=features.device), self.size, side))


def move(places: Int[Tensor, " places"], source: int, side: int) -> Int[Tensor, " places"]:
    """Row-major places on a `source` x `source` grid -> those on a `side` x `side` grid whose patches hold their
    middles. Different places stay different on a grid that is not smaller."""
    row, column = ((2 * i + 1) * side // (2 * source) for i in (places // source, places % source))
    return row * side + column


def select(
    features: Float[Tensor, "batch patches width"], places: Int[Tensor, " tokens"]
) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
    """The patches at these places, as a compressor returns them."""
    weights = nn.functional.one_hot(places, features.shape[1]).to(features.dtype)
    return features[:, places], weights.expand(features.shape[0], -1, -1)
