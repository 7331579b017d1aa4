"""Average pooling: each token is the mean of the patches in one cell of a C x C grid."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from . import Compressor, grid_side, register


@register("average")
class AverageCompressor(Compressor):
    """Pool the patches adaptively to C x C tokens, without parameters.

    This is the baseline of the compressor ablation in LLaVA-Mini (arXiv 2501.03895, Table 8).

    ```
    token(i, j) = mean of x(r, c) over floor(i S / C) <= r < ceil((i + 1) S / C), and c likewise with j
    ```

    x is the S x S grid of patches. The cells are those of `torch.nn.functional.adaptive_avg_pool2d`: neighbouring cells
    share patches where C does not divide S.

    Shapes:
        features (batch, S * S, width) -> tokens (batch, C * C, width), weights (batch, C * C, S * S)

    Raises:
        ValueError: If the patches form no square grid, or one smaller than C x C.
    """

    def forward(
        self, features: Float[Tensor, "batch patches width"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        weights = pooling_weights(self.size, features)
        return weights @ features, weights.expand(features.shape[0], -1, -1)


def pooling_weights(size: int, features: Float[Tensor, "batch patches width"]) -> Float[Tensor, "size*size patches"]:
    """Return the weight of each patch in the mean of each cell of a `size` x `size` grid.

    Args:
        size: C, the cells along each axis.
        features: Patch features. Only their number, dtype and device are used.

    Raises:
        ValueError: If the patches form no square grid, or one smaller than `size` x `size`.
    """
    side = grid_side(features.shape[1], size)
    axis = pooling_weights_1d(size, side, features)
    return torch.kron(axis, axis)


def pooling_weights_1d(cells: int, length: int, like: Tensor) -> Float[Tensor, "cells length"]:
    """Return the weight of each position on an axis in the mean of each cell of adaptive average pooling.

    Args:
        cells: Number of cells.
        length: Number of positions on the axis.
        like: A tensor that gives the dtype and the device of the result.
    """
    cell = torch.arange(cells, device=like.device)[:, None]  # (cells, 1)
    position = torch.arange(length, device=like.device)  # (length,)
    inside = (position >= cell * length // cells) & (position < -(-(cell + 1) * length // cells))
    return inside.to(like.dtype) / inside.sum(dim=1, keepdim=True)
