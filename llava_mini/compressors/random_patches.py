"""Random sampling: C x C patches at positions that were drawn once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import initialization as init

from . import Compressor, grid_side, register, vision_grid_side
from .uniform import rescale_grid_indices, select_patches

if TYPE_CHECKING:
    from transformers import LlavaConfig


@register("random")
class RandomCompressor(Compressor):
    """Sample the first C x C patches of a random permutation; a control that every method has to beat.

    ```
    tokens = x[sorted(pi[:C * C])],  pi a permutation of the vision tower's patches x
    ```

    The permutation is drawn from torch's generator when the module is built, and saved with it. It is the same for
    every image and every C, so a larger sample contains each smaller one. There are no parameters.

    An image in tiles or of another size has another grid than the vision tower's own. There the compressor takes the
    patches that contain the middles of the drawn positions, each patch once.

    Shapes:
        features (batch, S * S, width) -> tokens (batch, C * C, width), weights (batch, C * C, S * S)

    Raises:
        ValueError: If the patches form no square grid, or C x C exceeds their number or that of the vision tower's grid.
    """

    order: Tensor

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        self.side = vision_grid_side(config)
        self.register_buffer("order", torch.empty(self.side**2, dtype=torch.long))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.copy_(self.order, torch.randperm(self.side**2))

    def forward(
        self, features: Float[Tensor, "batch patches width"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        side = grid_side(features.shape[1], self.size)
        grid_side(self.side**2, self.size)
        drawn = rescale_grid_indices(self.order, self.side, side)
        ranks = torch.arange(len(drawn), device=drawn.device)
        # Positions that differ on the vision tower's grid may share a patch on a smaller grid: its first rank counts.
        first_ranks = ranks.new_full((side**2,), len(drawn)).scatter_reduce(0, drawn, ranks, "amin")
        return select_patches(features, first_ranks.argsort()[: self.size**2].sort().values)
