"""VTW: all visual tokens are removed from one layer on."""

from __future__ import annotations

from contextlib import AbstractContextManager

from transformers import PreTrainedModel

from probes.hooks.decoder import decoder_layers, find_decoder
from probes.interventions import Receipt, RemoveTokens, intervene
from probes.pruning.kept_tokens import PositionMode, RemovalMode
from probes.tokens.token_map import TokenMap


def vtw(
    model: PreTrainedModel, tokens: TokenMap, layer: int, how: RemovalMode = "drop", positions: PositionMode = "keep"
) -> AbstractContextManager[Receipt]:
    """Remove all visual tokens from `layer` on (visual tokens withdrawal, Lin et al. 2024).

    Args:
        model: A transformers model with a decoder.
        tokens: Map of the inputs that the model will be called with.
        layer: First layer without visual tokens, from 0.
        how: "drop" runs the layers without the tokens, "mask" hides them; see `RemoveTokens`.
        positions: "keep" the position ids of the remaining tokens or "renumber" them. The released code of VTW has
            this option too.

    Returns:
        Context manager that yields the receipt, with one effect.

    Raises:
        ValueError: The layer is outside the model.

    Example:
        >>> with vtw(model, tokens, layer=3) as receipt:
        ...     logits = model(**inputs).logits
        >>> int(receipt[0].chosen.sum())
        36
    """
    last = len(decoder_layers(find_decoder(model, tokens.stack)))
    return intervene(model, tokens, RemoveTokens("vision", range(layer, last), how=how, positions=positions))
