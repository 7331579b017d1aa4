"""CDPruner: patches that are relevant to the question and diverse, by a determinantal point process."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..full_precision import without_autocast
from . import Compressor, grid_side, register
from .uniform import select_patches

# Below this gain a patch lies in the span of the chosen ones, up to rounding in float32.
LEAST_GAIN = 1e-6


@register("cdpruner")
class CdPrunerCompressor(Compressor):
    """Keep C x C patches by greedy MAP inference of a conditional determinantal point process, without parameters.

    Source: CDPruner, arXiv 2506.10967; Theia-4869/CDPruner. Fast greedy MAP inference: arXiv 1709.05135.

    ```
    r_i    = mean over text tokens t of cos(p_i, t),  scaled to 0 ... 1 over the patches of an image
    L_ij   = r_i cos(x_i, x_j) r_j
    s_k    = argmax_i det(L over s_1 ... s_(k-1), i),  i not chosen before
    ```

    Patches that add nothing to the determinant come last, in descending relevance: all others once C x C exceeds the rank
    of the features. Of equal values the first patch wins. Without text, or with one relevance for all, r is 1. The kept
    patches are in row-major order.

    Departures: the paper's relevance for LLaVA is the cosine between CLIP's embeddings of patch and question, which needs
    CLIP's text encoder. Here p are the projected patches and t the language model's embeddings of all text except
    answers, which exist in every LLaVA.

    Gradients pass through the kept patches, not through their choice.

    Shapes:
        features (batch, S * S, width), projected (batch, S * S, text_width), text (batch, length, text_width),
        text_mask (batch, length) -> tokens (batch, C * C, width), weights (batch, C * C, S * S)

    Raises:
        ValueError: If the patches form no square grid, or are fewer than C x C.
    """

    needs = ("projected", "text", "text_mask")

    @without_autocast
    def forward(
        self,
        features: Float[Tensor, "batch patches width"],
        projected: Float[Tensor, "batch patches text_width"],
        text: Float[Tensor, "batch length text_width"],
        text_mask: Bool[Tensor, "batch length"],
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        grid_side(features.shape[1], self.size)
        relevance = text_relevance(projected.detach(), text.detach(), text_mask)
        return select_patches(features, greedy_map_patches(features.detach(), relevance, self.size**2))


def text_relevance(
    projected: Float[Tensor, "batch patches width"],
    text: Float[Tensor, "batch length width"],
    text_mask: Bool[Tensor, "batch length"],
) -> Float[Tensor, "batch patches"]:
    """Return the mean cosine of each patch with the text tokens, scaled to 0 ... 1 over the patches of each row.

    Args:
        projected: Patches in the space of the text embeddings.
        text: Embeddings of the text.
        text_mask: True at the tokens of the text. A row without any gets 1 everywhere.
    """
    patches, words = (nn.functional.normalize(states.float(), dim=-1) for states in (projected, text))
    # The mean of cosines is the product with the mean direction; its length does not matter, because r is rescaled.
    relevance = (patches @ (words * text_mask[..., None]).sum(dim=1)[..., None])[..., 0]
    lowest, highest = relevance.amin(dim=1, keepdim=True), relevance.amax(dim=1, keepdim=True)
    spread = highest - lowest
    return torch.where(spread > 0, (relevance - lowest) / spread.clamp_min(torch.finfo(spread.dtype).tiny), 1.0)


def greedy_map_patches(
    features: Float[Tensor, "batch patches width"], relevance: Float[Tensor, "batch patches"], count: int
) -> Int[Tensor, "batch count"]:
    """Return the indices of the patches that greedy MAP inference keeps, in ascending order.

    Each step adds the patch that raises the determinant of the chosen kernel most. That factor is the patch's pivot in a
    Cholesky factorisation, which is updated in each step.

    Args:
        features: Features of the patches; their cosines are the similarity.
        relevance: Relevance of each patch, from 0 to 1.
        count: Number of patches to keep, from 1 to all.

    Example:
        >>> vectors = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]])
        >>> greedy_map_patches(vectors, torch.tensor([[0.9, 1.0, 0.5]]), 2).tolist()
        [[1, 2]]
    """
    vectors = nn.functional.normalize(features.float(), dim=-1) * relevance[..., None]
    kernel = vectors @ vectors.transpose(1, 2)  # (batch, patches, patches)
    # The cosine of a patch with itself is 1. Its rounding error would decide between patches of equal relevance.
    gain = relevance.float().square() * features.any(dim=-1)
    factor = kernel.new_zeros(*gain.shape, count)  # columns of the Cholesky factor, one for each step
    taken = torch.zeros_like(gain, dtype=torch.bool)
    chosen = []
    for step in range(count):
        # relevance - 1 is at most 0, so that patches without a gain come after all others
        rank = torch.where(gain > LEAST_GAIN, gain, relevance - 1).masked_fill(taken, -torch.inf)
        best = rank.argmax(dim=1)[:, None]
        chosen.append(best)
        taken = taken.scatter(1, best, True)
        pivot = gain.gather(1, best)
        column = kernel.take_along_dim(best[..., None], dim=1)[:, 0]
        column = column - (factor @ factor.take_along_dim(best[..., None], dim=1).transpose(1, 2))[..., 0]
        column = torch.where(pivot > LEAST_GAIN, column * pivot.clamp_min(LEAST_GAIN).rsqrt(), 0)
        factor[..., step] = column
        gain = gain - column.square()
    return torch.cat(chosen, dim=1).sort(dim=1).values
