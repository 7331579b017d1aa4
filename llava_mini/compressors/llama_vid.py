"""LLaMA-VID: one token by attention from the question, the other tokens by pooling the image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from . import Compressor, grid_side, register
from .average import pooling_weights_1d

if TYPE_CHECKING:
    from transformers import LlavaConfig


@register("llama_vid")
class LlamaVidCompressor(Compressor):
    """Make one context token from the question and the image, and content tokens from the image alone.

    Source: LLaMA-VID, arXiv 2311.17043; dvlab-research/LLaMA-VID.

    ```
    context = mean_q(softmax(Q K^T / sqrt(d)) X) W_v,  Q = T W_t,  K = X W_k
    content(i, j) = mean of X over cell (i, j) of a grid of C - 1 rows and C + 1 columns
    ```

    T are the text tokens, X the patches of width d; mean_q is the mean over the text. Without any text the context token
    is the mean of the patches, times W_v. The context token comes first. The other n - 1 = (C - 1)(C + 1) tokens follow
    in row-major order, with the cells of adaptive average pooling. With n = 1 there is the context token alone.

    Departures:

    - The paper takes Q from a text decoder (BERT or a Q-Former) with weights of its own, which reads question and image.
      Here Q comes from the language model's embeddings of all text except answers.
    - The paper's W_v maps straight to the language model's width. Here both kinds of token pass the same projector,
      after compression or before it.
    - The paper's content tokens are the mean of all patches, or a square grid of means.
    - K has no bias, because softmax would cancel it.

    Shapes:
        features (batch, S * S, width), text (batch, length, text_width), text_mask (batch, length)
        -> tokens (batch, C * C, width), weights (batch, C * C, S * S)

    Raises:
        ValueError: If the patches form no square grid, or are fewer than C x C.
    """

    needs = ("text", "text_mask")

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        width = config.compressor_width
        self.text = nn.Linear(config.get_text_config().hidden_size, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)

    def forward(
        self,
        features: Float[Tensor, "batch patches width"],
        text: Float[Tensor, "batch length text_width"],
        text_mask: Bool[Tensor, "batch length"],
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        batch, patches, width = features.shape
        side = grid_side(patches, self.size)
        scores = self.text(text) @ self.key(features).transpose(1, 2) * width**-0.5  # (batch, length, patches)
        attention = scores.softmax(dim=-1, dtype=torch.float32).masked_fill(~text_mask[..., None], 0)
        text_lengths = text_mask.sum(dim=1)[:, None, None]
        context_weights = attention.sum(dim=1, keepdim=True) / text_lengths.clamp_min(1)
        # (batch, 1, patches)
        context_weights = torch.where(text_lengths > 0, context_weights, 1 / patches).to(features.dtype)
        row_weights = pooling_weights_1d(self.size - 1, side, features)
        column_weights = pooling_weights_1d(self.size + 1, side, features)
        content_weights = torch.kron(row_weights, column_weights).expand(batch, -1, -1)  # (batch, tokens - 1, patches)
        tokens = torch.cat([self.value(context_weights @ features), content_weights @ features], dim=1)
        return tokens, torch.cat([context_weights, content_weights], dim=1)
