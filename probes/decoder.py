"""Finds the language model inside a model and follows which positions its forward calls cover."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.tokens import TokenMap

# Attention implementations whose masks the probes can read and write: none, or [batch, 1, queries, keys].
IMPLEMENTATIONS = ("sdpa", "eager")
# Prefix of the implementations that `record_attention` registers while it records.
RECORDING = "probes_recording_"


def find_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder language model: `model` itself, or the one that a wrapper such as LLaVA holds.

    Raises ValueError when it has no `layers` with a `self_attn` each, or runs another attention than sdpa or eager.
    """
    decoder = model.get_decoder()
    if not hasattr(decoder, "layers") or not all(hasattr(layer, "self_attn") for layer in decoder_layers(decoder)):
        raise ValueError(f"{type(decoder).__name__} has no decoder layers with a self_attn each: it cannot be probed")
    implementation = decoder.config._attn_implementation
    if implementation not in IMPLEMENTATIONS and not str(implementation).startswith(RECORDING):
        raise ValueError(f"attention implementation {implementation!r} cannot be probed: load the model with 'sdpa'")
    return decoder


def decoder_layers(decoder: PreTrainedModel) -> list[nn.Module]:
    """The decoder's own layers: the one place to take them from, whatever else in a model shares their config."""
    return list(decoder.get_submodule("layers").children())


def select_layers(decoder: PreTrainedModel, layers: Iterable[int] | None) -> tuple[int, ...]:
    """`layers` in ascending order without doubles, or all of the decoder's. Raises ValueError outside the model."""
    count = len(decoder_layers(decoder))
    selected = tuple(sorted(set(range(count) if layers is None else layers)))
    outside = [layer for layer in selected if not 0 <= layer < count]
    if outside:
        raise ValueError(f"layers {outside} are outside the model: it has {count} layers, 0 to {count - 1}")
    return selected


class TokenWindow:
    """The stretch of a token map that the decoder's current forward call covers, while used as a context.

    Position ids do not tell it (they skip left padding), nor does the difference of key and query lengths (a static
    cache has room for keys to come): the cache's length before the call does.
    """

    def __init__(self, decoder: PreTrainedModel, tokens: TokenMap) -> None:
        self.decoder, self.tokens = decoder, tokens
        self.start = self.stop = 0

    def __enter__(self) -> TokenWindow:
        self._handle = self.decoder.register_forward_pre_hook(self._follow, with_kwargs=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()

    def _follow(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = kwargs.get("inputs_embeds")
        if inputs is None:
            inputs = args[0] if args else kwargs["input_ids"]
        batch, length = inputs.shape[:2]
        cache = kwargs.get("past_key_values")
        self.start = 0 if cache is None else int(cache.get_seq_length())
        self.stop = self.start + length
        rows, positions = self.tokens.labels.shape
        if batch != rows or (self.start == 0 and length != positions):
            raise ValueError(
                f"the token map has {rows} x {positions} positions (batch x length), the language model was called "
                f"with {batch} x {length}: build the map from the inputs of this very call"
            )
        grown = max(self.stop - positions, 0)
        labels = nn.functional.pad(self.tokens.labels, (0, grown), value=self.tokens.index(self.tokens.generated))
        self.labels = labels[:, : self.stop].to(inputs.device)

    @property
    def queries(self) -> Int[Tensor, "batch queries"]:
        """Groups of the call's queries."""
        return self.labels[:, self.start :]

    def first_key(self, length: int) -> int:
        """Position of the first of `length` keys: not 0 where a sliding cache has dropped the oldest."""
        return max(self.stop - length, 0)

    def keys(self, length: int) -> Int[Tensor, "batch keys"]:
        """Groups of the call's keys, -1 for the empty slots of a static cache."""
        first = self.first_key(length)
        keys = self.labels[:, first : first + length]
        return nn.functional.pad(keys, (0, length - keys.shape[1]), value=-1)
