"""Uniform sampling: the patch in the middle of each cell of a C x C grid."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import Compressor, grid_side, register


@register("uniform")
class UniformCompressor(Compressor):
    """Sample C x C patches at even distances; a control without parameters.

    ```
    token(i, j) = x(floor((2i + 1) S / 2C), floor((2j + 1) S / 2C)),  i, j = 0 ... C - 1
    ```

    x is the S x S grid of patches. Each token is one patch at full detail instead of the mean of a cell.

    Shapes:
        features (batch, S * S, width) -> tokens (batch, C * C, width), weights (batch, C * C, S * S)

    Raises:
        ValueError: If the patches form no square grid, or one smaller than C x C.
    """

    def forward(
        self, features: Float[Tensor, "batch patches width"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        side = grid_side(features.shape[1], self.size)
        cells = torch.arange(self.size**2, device=features.device)
        return select_patches(features, rescale_grid_indices(cells, self.size, side))


def rescale_grid_indices(indices: Int[Tensor, " count"], source: int, side: int) -> Int[Tensor, " count"]:
    """Map cells of one grid to the patches of another grid that contain their middles.

    Different cells stay different on a grid that is not smaller.

    Args:
        indices: Row-major indices on a `source` x `source` grid.
        source: Side of the grid that the indices refer to.
        side: Side of the other grid.

    Returns:
        Row-major indices on the `side` x `side` grid.
    """
    row, column = ((2 * i + 1) * side // (2 * source) for i in (indices // source, indices % source))
    return row * side + column


def select_patches(
    features: Float[Tensor, "batch patches width"], indices: Int[Tensor, "*batch tokens"]
) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
    """Return the patches at these indices as tokens, with their weights.

    Args:
        features: Features of the patches.
        indices: Indices of the patches, the same for every image or one row for each.
    """
    indices = indices.expand(features.shape[0], -1)
    weights = nn.functional.one_hot(indices, features.shape[1]).to(features.dtype)
    return features.take_along_dim(indices[..., None], dim=1), weights
