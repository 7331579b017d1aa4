"""FastV: only the most attended visual tokens stay from one layer on."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

from transformers import PreTrainedModel

from probes.interventions import Receipt
from probes.pruning.kept_tokens import PositionMode, RemovalMode
from probes.pruning.pyramid_drop import pyramid_drop
from probes.tokens.token_map import TokenMap


def fastv(
    model: PreTrainedModel,
    tokens: TokenMap,
    layer: int,
    keep: float,
    queries: Literal["last", "all"] = "last",
    how: RemovalMode = "drop",
    positions: PositionMode = "keep",
) -> AbstractContextManager[Receipt]:
    """Keep only the most attended visual tokens from `layer` on (FastV, Chen et al. 2024).

    Tokens are ranked by the attention they receive in layer `layer - 1`, mean over heads. `queries="last"` ranks by the
    last token of the prompt, as the released code does. `queries="all"` sums over the whole prompt, as the paper says.

    Args:
        model: A transformers model with a decoder.
        tokens: Map of the inputs that the model will be called with.
        layer: First layer without the removed tokens, at least 1.
        keep: Share of the visual tokens to keep, from 0 to below 1; the number of tokens is rounded down.
        queries: Tokens whose attention ranks: "last" or "all".
        how: "drop" runs the layers without the tokens, "mask" hides them; see `RemoveTokens`.
        positions: "keep" the position ids of the remaining tokens or "renumber" them.

    Returns:
        Context manager that yields the receipt, with one effect.

    Raises:
        ValueError: `layer` is 0 or outside the model, or `keep` is not in 0 to below 1.

    Example:
        >>> with fastv(model, tokens, layer=2, keep=0.25) as receipt:
        ...     logits = model(**inputs).logits
        >>> int(receipt[0].chosen.sum())  # removed, of 36
        27
    """
    return pyramid_drop(model, tokens, [layer], keep, queries, how, positions)
