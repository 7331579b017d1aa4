"""Learned queries that start as average pooling: attention is added to the means, through a map that starts at zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor
from transformers import initialization as init

from . import register
from .attention import MultiHeadAttention
from .average import pooling_weights
from .query import QueryCompressor

if TYPE_CHECKING:
    from transformers import LlavaConfig


@register("query_from_average")
class QueryFromAverageCompressor(QueryCompressor):
    """Add the output of LLaVA-Mini's learned queries to average pooling, starting at average pooling itself.

    This is a variant of [`QueryCompressor`] for short trainings, not the paper's method.

    ```
    tokens = Z + W_o A + b_o,  W_o = 0 and b_o = 0 at the start
    ```

    Z are the means of a C x C grid of cells, as in [`AverageCompressor`]. A is what the heads of the "multi_head" form
    of `query` read from all patches, and W_o and b_o are the output map of that attention. An untrained model therefore
    gets tokens that are bit-identical to those of `average`, in the range of features that the projector knows.
    A zero W_o passes no gradient on, so the queries learn from the second step on.

    The weights are the means of those of the pooling and of the attention, because both contribute to a token. W_o
    scales the attention's share of a token, which the weights leave out.

    Shapes:
        features (batch, S * S, width) -> tokens (batch, C * C, width), weights (batch, C * C, S * S)

    Raises:
        ValueError: If `compressor_attention` is "bare", which has no output map; and as [`QueryCompressor`] and
            [`AverageCompressor`].

    Example:
        >>> from llava_mini import LlavaMiniConfig
        >>> from llava_mini.compressors import COMPRESSORS
        >>> config = LlavaMiniConfig(compressor="query_from_average", compressor_size=2)
        >>> features = torch.randn(1, 36, config.compressor_width)
        >>> tokens, means = (COMPRESSORS[name](config)(features)[0] for name in ("query_from_average", "average"))
        >>> torch.equal(tokens, means)
        True
    """

    attn: MultiHeadAttention

    def __init__(self, config: LlavaConfig):
        if config.compressor_attention != "multi_head":
            raise ValueError(
                f"query_from_average: compressor_attention={config.compressor_attention!r} has no output map that could "
                "start at zero; use 'multi_head'"
            )
        super().__init__(config)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        # transformers initialises the children of a module first, so this comes after the output map's own values.
        init.zeros_(self.attn.out_proj.weight)
        init.zeros_(self.attn.out_proj.bias)

    def forward(
        self, features: Float[Tensor, "batch patches width"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        pooling = pooling_weights(self.size, features)  # (tokens, patches)
        detail, attention = super().forward(features)
        return pooling @ features + detail, (pooling + attention) / 2
