"""Which tokens an intervention means, and in which calls it acts."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from probes.hooks.token_window import TokenWindow

When = Literal["prefill", "decode", "both"]
# A group of the token map, or a mask of its positions (then no generated token is meant).
Tokens = str | Bool[Tensor, "batch positions"]
# The same, or what gives the mask once the first of the layers is reached: it may look at what layers before did.
LateTokens = Tokens | Callable[[], Bool[Tensor, "batch positions"]]
Result = TypeVar("Result")


def check_choice(name: str, value: str, *choices: str) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"unknown {name}={value!r}: it is {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}")


def check_when(when: str) -> None:
    """Raises ValueError for an unknown `when`."""
    check_choice("when", when, "prefill", "decode", "both")


def acts(window: TokenWindow, when: When) -> bool:
    """Whether the current call is one of `when`: it decodes where it starts after the last position of the map."""
    return when == "both" or (when == "decode") == (window.start >= window.tokens.labels.shape[1])


def describe(at: LateTokens) -> str:
    """Name of a selection for a receipt."""
    if isinstance(at, str):
        return at
    return f"{int(at.sum())} positions" if isinstance(at, Tensor) else getattr(at, "__name__", "chosen on the way")


class Selection:
    """Which queries and keys of the decoder's current call are meant.

    Raises ValueError for an unknown group, or a mask that is not bool or not of the map's shape.
    """

    def __init__(self, window: TokenWindow, at: LateTokens) -> None:
        self._window, self._late = window, None
        self._chosen: Tensor | None = None
        tokens = window.tokens
        self._generated = isinstance(at, str) and tokens.generated == at
        if isinstance(at, str):
            self._chosen = tokens.mask(at)
        elif isinstance(at, Tensor):
            self._chosen = self._checked(at, tokens.labels.shape[0])
        else:
            self._late = at

    def begin(self) -> None:
        """Asks a callable for its mask, at the first of its layers in a prompt."""
        window = self._window
        if self._late is None:
            return
        if window.start > 0:
            if self._chosen is None:
                raise ValueError("tokens are chosen on the way through the prompt: run it inside the block")
            return
        rows, positions = window.labels.shape
        if positions < window.tokens.labels.shape[1] and not window.padded:
            raise ValueError(
                "tokens can be chosen on the way only if the whole prompt runs in one call: do not chunk it"
            )
        self._chosen = self._checked(self._late(), rows)

    @property
    def chosen(self) -> Bool[Tensor, "batch positions"]:
        """Positions of the map that are meant, in rows of the map, or of the call where they were chosen on the way."""
        assert self._chosen is not None
        return self._chosen

    @property
    def so_far(self) -> Bool[Tensor, "batch positions"]:
        """Positions from the first to the call's last that are meant."""
        window, chosen = self._window, self.chosen
        if self._late is None:
            chosen = chosen[window.rows].repeat_interleave(window.copies, dim=0)
        chosen = chosen.to(window.labels.device)
        grown = max(window.stop - chosen.shape[1], 0)
        return nn.functional.pad(chosen, (0, grown), value=self._generated)[:, : window.stop]

    @property
    def queries(self) -> Bool[Tensor, "batch queries"]:
        """Which of the call's queries are meant."""
        return self.so_far[:, self._window.start :]

    def keys(self, length: int) -> Bool[Tensor, "batch keys"]:
        """Which of the call's keys are meant: never an empty slot of a static cache."""
        first = self._window.first_key(length)
        keys = self.so_far[:, first : first + length]
        return nn.functional.pad(keys, (0, length - keys.shape[1]), value=False)

    def _checked(self, mask: Tensor, rows: int) -> Tensor:
        shape = [rows, self._window.tokens.labels.shape[1]]
        if mask.dtype != torch.bool or list(mask.shape) != shape:
            raise ValueError(f"a mask of tokens is bool of shape {shape}; given: {mask.dtype} {list(mask.shape)}")
        return mask


class OncePerCall:
    """Keeps what the layers of one call of the decoder have in common."""

    def __init__(self, window: TokenWindow) -> None:
        self._window = window
        self._call: Tensor | None = None
        self._results: list[tuple[Hashable, tuple[Any, ...], Any]] = []

    def __call__(self, key: Hashable, make: Callable[[], Result], *inputs: Any) -> Result:
        """What `make` gives; the same again for an equal key and the same objects `inputs` in the same call."""
        if self._call is not self._window.labels:
            self._call, self._results = self._window.labels, []
        for known, objects, result in self._results:
            if known == key and all(a is b for a, b in zip(objects, inputs, strict=True)):
                return result
        result = make()
        self._results.append((key, inputs, result))
        return result
