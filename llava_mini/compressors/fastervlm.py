"""FasterVLM: the patches that the class token attends to most."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from . import Compressor, grid_side, register
from .prumerge import most_salient_patches
from .uniform import select_patches


@register("fastervlm")
class FasterVlmCompressor(Compressor):
    """Keep the C x C patches of highest saliency, without parameters.

    Source: FasterVLM, the first version of VisPruner (arXiv 2412.01818v1); Theia-4869/FasterVLM.

    ```
    tokens = x_i,  i over the n = C x C patches where the attention of the class token is highest
    ```

    The kept patches are in row-major order. Of equal saliencies the first patch wins.

    Departures: saliency comes from the layer whose output is compressed. A vision tower without a class token has the
    mean attention of all patches instead.

    Shapes:
        features (batch, S * S, width), saliency (batch, S * S)
        -> tokens (batch, C * C, width), weights (batch, C * C, S * S)

    Raises:
        ValueError: If the patches form no square grid, or are fewer than C x C.
    """

    needs = ("saliency",)

    def forward(
        self, features: Float[Tensor, "batch patches width"], saliency: Float[Tensor, "batch patches"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        grid_side(features.shape[1], self.size)
        return select_patches(features, most_salient_patches(saliency, self.size**2))
