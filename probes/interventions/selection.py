"""Which tokens an intervention means, and in which calls it acts."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel

from probes.decoder import TokenWindow
from probes.tokens import TokenMap

When = Literal["prefill", "decode", "both"]
# A group of the token map, or a mask of its positions (then no generated token is meant).
Tokens = str | Bool[Tensor, "batch positions"]


def check_when(when: str) -> None:
    """Raises ValueError unless `when` is one of its three values."""
    if when not in ("prefill", "decode", "both"):
        raise ValueError(f"unknown when={when!r}: it is 'prefill', 'decode' or 'both'")


def describe(at: Tokens) -> str:
    """Name of a selection for a receipt."""
    return at if isinstance(at, str) else f"{int(at.sum())} positions"


class Selection(AbstractContextManager["Selection"]):
    """Which queries and keys of the decoder's current call are meant, while used as a context.

    Raises ValueError for an unknown group, or a mask that is not bool or not of the map's shape.
    """

    def __init__(self, decoder: PreTrainedModel, tokens: TokenMap, at: Tokens) -> None:
        if isinstance(at, str):
            chosen, generated = tokens.mask(at), tokens.generated == at
        else:
            if at.dtype != torch.bool or at.shape != tokens.labels.shape:
                shape = list(tokens.labels.shape)
                raise ValueError(f"a mask of tokens is bool of shape {shape}; given: {at.dtype} {list(at.shape)}")
            chosen, generated = at.to(tokens.labels.device), False
        # A map of two groups, so that the window that follows the calls can follow this selection too.
        chosen_map = replace(
            tokens, labels=chosen.long(), groups=("others", "chosen"), generated="chosen" if generated else "others"
        )
        self._window = TokenWindow(decoder, chosen_map)
        self._prompt = tokens.labels.shape[1]

    def __enter__(self) -> Selection:
        self._window.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._window.__exit__(*exception)

    def acts(self, when: When) -> bool:
        """Whether the call is one of `when`: it decodes where it starts after the last position of the map."""
        return when == "both" or (when == "decode") == (self._window.start >= self._prompt)

    @property
    def queries(self) -> Bool[Tensor, "batch queries"]:
        """Which of the call's queries are chosen."""
        return self._window.queries == 1

    def keys(self, length: int) -> Bool[Tensor, "batch keys"]:
        """Which of the call's keys are chosen: never an empty slot of a static cache."""
        return self._window.keys(length) == 1
