"""Random dropping: a random share of the visual tokens stays from one layer on; a control for other methods."""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel

from probes.hooks.decoder import decoder_layers, find_decoder, select_layers
from probes.interventions import Receipt, RemoveTokens, intervene
from probes.pruning.kept_tokens import PositionMode, RemovalMode, check_share, count_kept_tokens
from probes.tokens.token_map import TokenMap


def random_drop(
    model: PreTrainedModel,
    tokens: TokenMap,
    layer: int,
    keep: float,
    seed: int = 0,
    how: RemovalMode = "drop",
    positions: PositionMode = "keep",
) -> AbstractContextManager[Receipt]:
    """Keep a random share of each row's visual tokens from `layer` on.

    One number is drawn for the first, second, ... visual token of a row, the same in every row. The tokens with the
    lowest numbers stay. So a row's choice depends on the seed and on its number of visual tokens alone, and a larger
    share contains each smaller one.

    Args:
        model: A transformers model with a decoder.
        tokens: Map of the inputs that the model will be called with.
        layer: First layer without the removed tokens, from 0.
        keep: Share of the visual tokens to keep, from 0 to below 1; the number of tokens is rounded down.
        seed: Seed of the numbers.
        how: "drop" runs the layers without the tokens, "mask" hides them; see `RemoveTokens`.
        positions: "keep" the position ids of the remaining tokens or "renumber" them.

    Returns:
        Context manager that yields the receipt, with one effect.

    Raises:
        ValueError: The layer is outside the model, or `keep` is not in 0 to below 1.

    Example:
        >>> from probes.pruning import random_drop
        >>> with random_drop(model, tokens, layer=2, keep=0.25) as receipt:
        ...     logits = model(**inputs).logits
        >>> int(receipt[0].chosen.sum())  # removed, of 36
        27
    """
    check_share(keep)
    decoder = find_decoder(model, tokens.stack)
    select_layers(decoder, [layer])
    layers = range(layer, len(decoder_layers(decoder)))
    removed = removed_at_random(tokens.mask("vision"), keep, seed)
    return intervene(model, tokens, RemoveTokens(removed, layers, how=how, positions=positions))


def removed_at_random(
    vision: Bool[Tensor, "batch positions"], keep: float, seed: int
) -> Bool[Tensor, "batch positions"]:
    """Return the visual tokens to remove.

    Args:
        vision: The visual tokens.
        keep: Share of them to keep.
        seed: Seed of the numbers.
    """
    draws = torch.from_numpy(np.random.default_rng(seed).random(vision.shape[1])).to(vision.device)
    drawn = draws[(vision.cumsum(dim=1) - 1).clamp(min=0)].masked_fill(~vision, torch.inf)
    count = count_kept_tokens(vision.sum(dim=1, keepdim=True), keep).to(vision.device)
    return vision & (drawn.argsort(dim=1, stable=True).argsort(dim=1) >= count)
