"""LLaMA-VID: one token of what the question asks for, and a few of what the picture shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from . import Compressor, grid_side, register
from .average import cells

if TYPE_CHECKING:
    from transformers import LlavaConfig


@register("llama_vid")
class LlamaVidCompressor(Compressor):
    """A context token and content tokens (LLaMA-VID, arXiv 2311.17043; dvlab-research/LLaMA-VID).

    The context token is mean_q(softmax(Q K^T / sqrt(d)) X) W_v, with Q = T W_t for every token of the text T, K = X W_k
    for the patches X of width d, and the mean over the text; without any text it is the mean of the patches, times W_v.
    It comes first. The other n - 1 = (C - 1)(C + 1) tokens are the means of the cells of a grid of C - 1 rows and C + 1
    columns, as in adaptive average pooling, row-major. With n = 1 there is the context token alone.

    Departures: the paper's Q comes from a text decoder, BERT or a Q-Former, that sees question and picture and has weights
    of its own; here from the embeddings of the language model, of all text that is no answer. Its W_v goes straight to
    the language model's width; here both kinds of token pass the projector alike, after compression or before it. Its
    content tokens are the mean of all patches, or a square grid of them. K has no bias, which softmax would cancel.

    Raises:
        ValueError: If the patches form no square grid or are fewer than C x C.
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
        words = text_mask.sum(dim=1)[:, None, None]
        asked = attention.sum(dim=1, keepdim=True) / words.clamp_min(1)
        asked = torch.where(words > 0, asked, 1 / patches).to(features.dtype)  # (batch, 1, patches)
        rows, columns = (cells(self.size + more, side, features) for more in (-1, 1))
        shown = torch.kron(rows, columns).expand(batch, -1, -1)  # (batch, tokens - 1, patches)
        tokens = torch.cat([self.value(asked @ features), shown @ features], dim=1)
        return tokens, torch.cat([asked, shown], dim=1)
