"""The tokens that an intervention changes, and the calls in which it acts."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Literal, TypeVar

from jaxtyping import Bool
from torch import Tensor, nn

from probes.hooks.token_window import TokenWindow
from probes.tokens.position_mask import checked_mask

When = Literal["prefill", "decode", "both"]
# A group of the token map, or a mask of its positions (then no generated token is selected).
TokenSelector = str | Bool[Tensor, "batch positions"]
# The same, or a callable that returns the mask when the first of the layers is reached. It may use results of earlier
# layers.
DeferredTokenSelector = TokenSelector | Callable[[], Bool[Tensor, "batch positions"]]
Result = TypeVar("Result")


def check_choice(name: str, value: str, *choices: str) -> None:
    """Check that `value` is one of `choices`.

    Args:
        name: The parameter's name, for the error.
        value: The parameter's value.
        choices: At least two valid values.

    Raises:
        ValueError: It is none of them.
    """
    if value not in choices:
        raise ValueError(f"unknown {name}={value!r}: choose {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}")


def check_when(when: str) -> None:
    """Check that `when` is "prefill", "decode" or "both".

    Raises:
        ValueError: It is none of them.
    """
    check_choice("when", when, "prefill", "decode", "both")


def acts_in_current_call(window: TokenWindow, when: When) -> bool:
    """Return whether an intervention acts in the current call.

    Args:
        window: The positions of the map that the call covers. A call that starts after the map's last position is a
            decoding step.
        when: The calls in which the intervention acts.
    """
    return when == "both" or (when == "decode") == (window.start >= window.tokens.labels.shape[1])


def selection_name(at: DeferredTokenSelector) -> str:
    """Return the name of a selection for a receipt."""
    if isinstance(at, str):
        return at
    return f"{int(at.sum())} positions" if isinstance(at, Tensor) else getattr(at, "__name__", "chosen on the way")


def check_selector(name: str, at: Any, deferred: bool = False) -> None:
    """Check that a token selector is a group or a mask.

    Args:
        name: The parameter's name, for the error.
        at: What a user gave.
        deferred: Whether a callable will do too.

    Raises:
        TypeError: It is none of these.
    """
    if not isinstance(at, str | Tensor) and not (deferred and callable(at)):
        raise TypeError(
            f"{name}: found a {type(at).__name__}; pass one group of the map, or a mask of positions as a tensor of torch.bool"
        )


class TokenSelection:
    """The selected queries and keys of the decoder's current call.

    Args:
        window: The positions of the map that the call covers.
        at: A group, a mask of positions, or a callable that returns the mask.

    Raises:
        ValueError: An unknown group, or a mask that is not bool or not of the map's shape.
    """

    def __init__(self, window: TokenWindow, at: DeferredTokenSelector) -> None:
        self._window = window
        self._make_mask: Callable[[], Tensor] | None = None
        self._chosen: Tensor | None = None
        tokens = window.tokens
        self._includes_generated = isinstance(at, str) and tokens.generated == at
        if isinstance(at, str):
            self._chosen = tokens.mask(at)
        elif isinstance(at, Tensor):
            self._chosen = checked_mask(at, list(tokens.labels.shape))
        else:
            self._make_mask = at

    def begin(self) -> None:
        """Call a deferred selector for its mask, at the first of its layers in a prompt.

        Raises:
            ValueError: The prompt did not run in one call inside the block.
        """
        window = self._window
        if self._make_mask is None:
            return
        if window.start > 0:
            if self._chosen is None:
                raise ValueError("a callable group is called in the prompt: run the prompt inside the block")
            return
        rows, positions = window.labels.shape
        if positions < window.tokens.labels.shape[1] and not window.padded:
            raise ValueError(
                f"a callable group needs the whole prompt in one call, which has {positions} of "
                f"{window.tokens.labels.shape[1]} positions: do not run it in chunks"
            )
        self._chosen = checked_mask(self._make_mask(), [rows, window.tokens.labels.shape[1]])

    @property
    def is_deferred(self) -> bool:
        """Return whether a callable chooses the tokens."""
        return self._make_mask is not None

    @property
    def chosen(self) -> Bool[Tensor, "batch positions"]:
        """Return the mask of the selected positions of the map.

        It has the map's rows; with a deferred selector, it has the call's rows.
        """
        assert self._chosen is not None
        return self._chosen

    @property
    def so_far(self) -> Bool[Tensor, "batch positions"]:
        """Return which positions are selected, from the first position to the last of the current call."""
        window, chosen = self._window, self.chosen
        if self._make_mask is None:
            chosen = chosen[window.rows].repeat_interleave(window.copies, dim=0)
        chosen = chosen.to(window.labels.device)
        generated = max(window.stop - chosen.shape[1], 0)
        return nn.functional.pad(chosen, (0, generated), value=self._includes_generated)[:, : window.stop]

    @property
    def queries(self) -> Bool[Tensor, "batch queries"]:
        """Return which of the call's queries are selected."""
        return self.so_far[:, self._window.start :]

    def keys(self, length: int) -> Bool[Tensor, "batch keys"]:
        """Return which of the call's keys are selected; an empty slot of a static cache never is.

        Args:
            length: Number of keys of the call.
        """
        first = self._window.first_key(length)
        keys = self.so_far[:, first : first + length]
        return nn.functional.pad(keys, (0, length - keys.shape[1]), value=False)


class PerCallCache:
    """Cache of the results that the layers of one decoder call share.

    Args:
        window: The positions that the current call covers. A new call empties the cache.
    """

    def __init__(self, window: TokenWindow) -> None:
        self._window = window
        self._call: Tensor | None = None
        self._results: list[tuple[Hashable, tuple[Any, ...], Any]] = []

    def __call__(self, key: Hashable, make: Callable[[], Result], *inputs: Any) -> Result:
        """Return the result of `make`, which runs once in a call for an equal key and the same objects.

        Args:
            key: Names the result.
            make: Computes the result.
            inputs: Objects that the result depends on; compared by identity.
        """
        if self._call is not self._window.labels:
            self._call, self._results = self._window.labels, []
        for cached_key, cached_inputs, result in self._results:
            if cached_key == key and all(a is b for a, b in zip(cached_inputs, inputs, strict=True)):
                return result
        result = make()
        self._results.append((key, inputs, result))
        return result
