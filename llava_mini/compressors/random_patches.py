"""Random sampling: C x C patches at places that chance has fixed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import initialization as init

from . import Compressor, configured_side, grid_side, register
from .uniform import move, select

if TYPE_CHECKING:
    from transformers import LlavaConfig


@register("random")
class RandomCompressor(Compressor):
    """The first C x C of a permutation of the tower's patches, in row-major order: a control without parameters that
    every method has to beat.

    The permutation is drawn with the module from torch's generator, saved with it, and the same for every picture and
    every C: smaller samples are parts of larger ones. On another grid than the tower's own, that of a picture in tiles
    or of another size, it takes the patches that hold the middles of those places, each patch once.

    Raises:
        ValueError: If the patches form no square grid, or C x C are more than they or the tower's own are.
    """

    order: Tensor

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        self.side = configured_side(config)
        self.register_buffer("order", torch.empty(self.side**2, dtype=torch.long))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.copy_(self.order, torch.randperm(self.side**2))

    def forward(
        self, features: Float[Tensor, "batch patches width"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        side = grid_side(features.shape[1], self.size)
        grid_side(self.side**2, self.size)
        places = move(self.order, self.side, side)
        turn = torch.arange(len(places), device=places.device)
        # when each patch has its first turn: places that lie apart on the tower's grid may share one on a smaller grid
        first = turn.new_full((side**2,), len(places)).scatter_reduce(0, places, turn, "amin")
        return select(features, first.argsort()[: self.size**2].sort().values)
