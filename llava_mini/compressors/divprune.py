"""DivPrune: the patches whose least distance to each other is as large as possible."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..full_precision import without_autocast
from . import Compressor, grid_side, register
from .uniform import select_patches


@register("divprune")
class DivPruneCompressor(Compressor):
    """Keep C x C patches by the greedy solution of the max-min diversity problem, without parameters.

    Source: DivPrune, arXiv 2503.02175. Written from the paper's formulas; no released code was used.

    ```
    d(i, j) = 1 - cos(x_i, x_j)
    s_1     = argmax_i  min over j != i       of d(i, j)
    s_k     = argmax_i  min over j in s_1 ... s_(k-1) of d(i, j),  i not chosen before
    ```

    Of equal distances the first patch in row-major order wins. The kept patches are in row-major order.

    Departures: the paper compares the visual tokens that enter the language model. Here the compared features are those
    that are compressed: the vision tower's, or with `compress_before_projection=False` the projected ones of the paper.

    Gradients pass through the kept patches, not through their choice.

    Shapes:
        features (batch, S * S, width) -> tokens (batch, C * C, width), weights (batch, C * C, S * S)

    Raises:
        ValueError: If the patches form no square grid, or are fewer than C x C.
    """

    @without_autocast
    def forward(
        self, features: Float[Tensor, "batch patches width"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        grid_side(features.shape[1], self.size)
        return select_patches(features, most_diverse_patches(features.detach(), self.size**2))


def most_diverse_patches(features: Float[Tensor, "batch patches width"], count: int) -> Int[Tensor, "batch count"]:
    """Return the indices of the patches that the greedy max-min rule keeps, in ascending order.

    Args:
        features: Features of the patches.
        count: Number of patches to keep, from 1 to all.

    Example:
        >>> vectors = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]]])
        >>> most_diverse_patches(vectors, 2).tolist()
        [[0, 3]]
    """
    directions = nn.functional.normalize(features.float(), dim=-1)
    distance = 1 - directions @ directions.transpose(1, 2)  # (batch, patches, patches)
    itself = torch.eye(features.shape[1], dtype=torch.bool, device=features.device)
    chosen = [distance.masked_fill(itself, torch.inf).amin(dim=2).argmax(dim=1)]
    nearest = torch.full_like(distance[:, 0], torch.inf)  # distance of each patch to the closest one that was chosen
    taken = torch.zeros_like(nearest, dtype=torch.bool)
    for _ in range(count - 1):
        nearest = torch.minimum(nearest, distance.take_along_dim(chosen[-1][:, None, None], dim=1)[:, 0])
        taken = taken.scatter(1, chosen[-1][:, None], True)
        chosen.append(nearest.masked_fill(taken, -torch.inf).argmax(dim=1))
    return torch.stack(chosen, dim=1).sort(dim=1).values
