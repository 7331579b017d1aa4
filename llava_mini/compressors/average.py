"""Average pooling: a token is the mean of the patches in one cell of a C x C grid."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from . import Compressor, grid_side, register


@register("average")
class AverageCompressor(Compressor):
    """Adaptive average pooling, the parameter-free baseline of the paper's compressor ablation.

    Cells follow `torch.nn.functional.adaptive_avg_pool2d`: where C does not divide the side of the patch grid,
    neighbouring cells share patches.
    """

    def forward(
        self, features: Float[Tensor, "batch patches width"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        weights = cell_means(self.size, features)
        return weights @ features, weights.expand(features.shape[0], -1, -1)


def cell_means(size: int, features: Float[Tensor, "batch patches width"]) -> Float[Tensor, "size*size patches"]:
    """The weight of each patch in the mean of each cell of a `size` x `size` grid, in the features' dtype.

    Raises:
        ValueError: If the patches form no square grid or a smaller one.
    """
    side = grid_side(features.shape[1], size)
    axis = cells(size, side, features)
    return torch.kron(axis, axis)


def cells(count: int, side: int, like: Tensor) -> Float[Tensor, "count side"]:
    """The weight of each of `side` places in the mean of each of `count` cells of a line, as adaptive pooling has them;
    dtype and device are those of `like`."""
    cell = torch.arange(count, device=like.device)[:, None]  # (count, 1)
    place = torch.arange(side, device=like.device)  # (side,)
    inside = (place >= cell * side // count) & (place < -(-(cell + 1) * side // count))
    return inside.to(like.dtype) / inside.sum(dim=1, keepdim=True)
