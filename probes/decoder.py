"""Finds a stack of decoder layers inside a model and follows which positions its forward calls cover."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import (
    create_causal_mask,
    eager_mask,
    flash_attention_mask,
    flex_attention_mask,
    sdpa_mask,
)

from probes.tokens import TokenMap

# What an attention implementation does with its mask follows from the function that makes the mask: a kernel from the
# hub that is registered under a name of its own takes the masks of flash attention.
FAMILIES = {sdpa_mask: "sdpa", eager_mask: "eager", flash_attention_mask: "flash", flex_attention_mask: "flex"}
# Families whose masks can be written too: none, or [batch, 1, queries, keys].
WRITABLE = ("sdpa", "eager")
# What transformers calls keys and values in calls and outputs: from 5.24 on, where both are taken, and before.
_CACHE_NAMES = ("cache", "past_key_values")
_CACHE = next(name for name in _CACHE_NAMES if name in inspect.signature(create_causal_mask).parameters)


def attention_family(implementation: str | None) -> str | None:
    """sdpa, eager, flash or flex; None for an implementation whose masks are not known, such as paged attention."""
    return FAMILIES.get(AttentionMaskInterface().get(implementation))


def find_decoder(
    model: PreTrainedModel, stack: str = "decoder", families: Collection[str] = WRITABLE
) -> PreTrainedModel:
    """A stack of decoder layers: a module with `layers`, each with a `self_attn`, and with a `config`.

    Args:
        model: A decoder language model, or a wrapper such as LLaVA that holds one.
        stack: `tokens.stack`: "decoder" for the language model itself, "prefusion" for LLaVA-Mini's pre-fusion.
        families: Attention that the caller can deal with.

    Raises ValueError when there is no such stack, or it runs another attention.
    """
    decoder = model.get_decoder()
    if stack == "prefusion":
        decoder = getattr(model.base_model, "prefusion", None)
        if decoder is None:
            raise ValueError(f"{type(model).__name__} has no pre-fusion layers, which this token map is of")
    elif stack != "decoder":
        raise ValueError(f"unknown stack {stack!r} of a token map: there are decoder, prefusion")
    if not hasattr(decoder, "layers") or not all(hasattr(layer, "self_attn") for layer in decoder_layers(decoder)):
        raise ValueError(f"{type(decoder).__name__} has no decoder layers with a self_attn each: it cannot be probed")
    implementation = decoder.config._attn_implementation
    if attention_family(implementation) not in families:
        raise ValueError(f"attention implementation {implementation!r} cannot be probed: load the model with 'sdpa'")
    return decoder


def cache_name(named: Mapping[str, Any]) -> str:
    """What keys and values go by in the keywords of a model's or a layer's call, or in a model's output; where there are
    none, what they would go by."""
    return next((name for name in _CACHE_NAMES if name in named), _CACHE)


def decoder_layers(decoder: nn.Module) -> list[nn.Module]:
    """The stack's own layers: the one place to take them from, whatever else in a model shares their config."""
    return list(decoder.get_submodule("layers").children())


def select_layers(decoder: nn.Module, layers: Iterable[int] | None) -> tuple[int, ...]:
    """`layers` in ascending order without doubles, or all of the stack's. Raises ValueError outside the model."""
    count = len(decoder_layers(decoder))
    selected = tuple(sorted(set(range(count) if layers is None else layers)))
    outside = [layer for layer in selected if not 0 <= layer < count]
    if outside:
        raise ValueError(f"layers {outside} are outside the model: it has {count} layers, 0 to {count - 1}")
    return selected


class TokenWindow:
    """The stretch of a token map that the stack's current forward call covers, while used as a context.

    Position ids do not tell it (they skip left padding), nor does the difference of key and query lengths (a static
    cache has room for keys to come): the cache's length before the call does.

    Pre-fusion takes a map's rows a chunk at a time. The language model may get each row of a map several times, side by
    side, as `generate` lays out beams and several answers to one prompt.

    Attributes:
        rows: Rows of the map that the call covers.
        copies: How many rows of the call there are for each of them.
        start, stop: Positions of the call's queries.
        labels: `[batch, stop]`, groups of all positions so far.
        padded: Whether the map's rows go on behind `stop` with nothing but padding that the call leaves out.
    """

    def __init__(self, decoder: nn.Module, tokens: TokenMap) -> None:
        self.decoder, self.tokens = decoder, tokens
        self.rows, self.copies = slice(0, 0), 1
        self.start = self.stop = 0
        self.padded = False
        self._thread: int | None = None

    def __enter__(self) -> TokenWindow:
        inside = self.tokens.stack == "prefusion"
        follow = self._follow_prefusion if inside else self._follow
        self._handles = [self.decoder.register_forward_pre_hook(follow, with_kwargs=True)]
        if inside:  # its last layer leaves out what nobody reads, unless a hook looks on
            self._handles.append(decoder_layers(self.decoder)[-1].register_forward_pre_hook(lambda *_: None))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _follow(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._keep_to_one_thread()
        inputs = kwargs.get("inputs_embeds")
        if inputs is None:
            inputs = args[0] if args else kwargs["input_ids"]
        batch, length = inputs.shape[:2]
        cache = kwargs.get(cache_name(kwargs))
        start = 0 if cache is None else int(cache.get_seq_length())
        if self.stop and start not in (0, self.stop):
            raise RuntimeError(
                f"the model went on at position {start} after {self.stop}: probes follow a cache that only grows, "
                "without assisted decoding"
            )
        self.start, self.stop = start, start + length
        rows, positions = self.tokens.labels.shape
        copies, rest = divmod(batch, rows) if rows else (0, 1)
        if rest or not copies or (start == 0 and length > positions):
            self._refuse(batch, length)
        if copies > 1 and start < positions and not _repeats(inputs, copies):
            self._refuse(batch, length)
        if start and self.rows.stop and copies != self.copies:
            self._refuse(batch, length)
        self.rows, self.copies = slice(0, rows), copies
        grown = max(self.stop - positions, 0)
        labels = nn.functional.pad(self.tokens.labels, (0, grown), value=self.tokens.index(self.tokens.generated))
        self.labels = labels[:, : self.stop].to(inputs.device).repeat_interleave(copies, dim=0)

    def _follow_prefusion(self, prefusion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._keep_to_one_thread()
        visual, text = (
            args[place] if len(args) > place else kwargs[name] for place, name in enumerate(("visual", "text"))
        )
        if kwargs.get("past") is not None:
            raise ValueError("pictures encoded ahead skip pre-fusion's visual tokens: give pixel_values to probe it")
        batch, length = visual.shape[0], visual.shape[1] + text.shape[1]
        rows = self.tokens.labels.shape[0]
        first = self.rows.stop if self.rows.stop < rows else 0
        self.rows, self.stop = slice(first, first + batch), length
        labels = self.tokens.labels[self.rows].to(visual.device)
        if len(labels) != batch or labels.shape[1] < length or (labels[:, length:] != self.tokens.index("pad")).any():
            self._refuse(batch, length)
        self.labels, self.padded = labels[:, :length], labels.shape[1] > length

    def _refuse(self, batch: int, length: int) -> None:
        rows, positions = self.tokens.labels.shape
        called, advice = "the language model", ", and generate without an assistant"
        if self.tokens.stack == "prefusion":
            called, advice = "pre-fusion", ""
        raise ValueError(
            f"the token map has {rows} x {positions} positions (batch x length), {called} was called "
            f"with {batch} x {length}: build the map from the inputs of this very call{advice}"
        )

    def _keep_to_one_thread(self) -> None:
        thread = threading.get_ident()
        if self._thread not in (None, thread):
            raise RuntimeError("a second thread calls a model that is being probed: use one model for each thread")
        self._thread = thread

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


def _repeats(inputs: Tensor, copies: int) -> bool:
    """Whether each row stands in the batch `copies` times; pictures that were encoded anew differ by rounding."""
    rows = inputs.unflatten(0, (-1, copies)).float()
    return torch.allclose(rows, rows[:, :1].expand_as(rows), rtol=0.0, atol=0.02 * float(rows.abs().max()))
