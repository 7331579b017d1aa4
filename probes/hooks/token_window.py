"""The positions of a token map that one forward call covers."""

from __future__ import annotations

import inspect
import threading
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from probes.hooks.checkpointing import refuse_checkpointing
from probes.hooks.compiled_code import EagerExecution
from probes.hooks.decoder import cache_name, decoder_layers
from probes.tokens.token_map import TokenMap


class TokenWindow:
    """Follow which positions of a token map each forward call of a stack covers, while used as a context manager.

    The cache length before a call determines its position. Position ids do not, since they skip left padding. Nor do
    query and key lengths, since a static cache reserves memory for later keys.

    Pre-fusion processes the rows of a map in chunks. The language model may receive each row of a map several times,
    side by side: `generate` arranges beams, and several answers to one prompt, in this way.

    The cache may hold earlier positions of the map from before the block, such as the first turns of a conversation. The
    map then describes the whole conversation.

    Compiled code runs eagerly meanwhile, and calls whose layers would run again in the backward pass are refused.

    Attributes:
        rows: Rows of the map that the call covers.
        copies: Number of rows of the call per row of the map.
        start, stop: First position of the call's queries, and the position after the last.
        labels: Groups of all positions so far `[batch, stop]`.
        padded: Whether the map's rows continue after `stop` with padding that the call omits.
    """

    def __init__(self, decoder: nn.Module, tokens: TokenMap) -> None:
        self.decoder, self.tokens = decoder, tokens
        self.rows, self.copies = slice(0, 0), 1
        self.start = self.stop = 0
        self.padded = False
        self._thread: int | None = None
        self._eager = EagerExecution(decoder)

    def __enter__(self) -> TokenWindow:
        self._eager.__enter__()
        is_prefusion = self.tokens.stack == "prefusion"
        hook = self._before_prefusion_call if is_prefusion else self._before_decoder_call
        self._handles = refuse_checkpointing(self.decoder)
        self._handles.append(self.decoder.register_forward_pre_hook(hook, with_kwargs=True))
        if is_prefusion:  # without a hook, its last layer skips positions that no later step reads
            self._handles.append(decoder_layers(self.decoder)[-1].register_forward_pre_hook(lambda *_: None))
        if "logits_to_keep" in inspect.signature(type(self.decoder).forward).parameters:
            self._handles.append(self.decoder.register_forward_pre_hook(_run_all_positions, with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._eager.__exit__()

    def labels_by(self, tokens: TokenMap) -> Int[Tensor, "batch stop"]:
        """Return the groups that another map of the same inputs gives to all positions so far."""
        if self.tokens.stack == "prefusion":
            return tokens.labels[self.rows].to(self.labels.device)[:, : self.stop]
        return self._with_generated(tokens).to(self.labels.device)

    def first_key(self, length: int) -> int:
        """Return the position of the first of `length` keys, not 0 if a sliding cache has dropped the oldest."""
        return max(self.stop - length, 0)

    def keys(self, length: int) -> Int[Tensor, "batch keys"]:
        """Return the groups of the call's `length` keys, -1 for the empty slots of a static cache."""
        first = self.first_key(length)
        keys = self.labels[:, first : first + length]
        return nn.functional.pad(keys, (0, length - keys.shape[1]), value=-1)

    def _before_decoder_call(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._require_one_thread()
        inputs = kwargs.get("inputs_embeds")
        if inputs is None:
            inputs = args[0] if args else kwargs["input_ids"]
        batch, length = inputs.shape[:2]
        cache = kwargs.get(cache_name(kwargs))
        start = 0 if cache is None else int(cache.get_seq_length())
        if self.stop and start not in (0, self.stop):
            raise RuntimeError(
                f"the model continued at position {start} after {self.stop}; probes need a cache that only grows, so "
                "generate without assisted decoding or guidance"
            )
        is_first_call = not self.stop
        self.start, self.stop = start, start + length
        rows, positions = self.tokens.labels.shape
        if start and (
            start < positions < self.stop or (is_first_call and _continues_other_text(start, length, positions))
        ):
            raise ValueError(
                f"the language model was called with {length} positions after {start} in its cache, but the token map has "
                f"{positions}; build the map from the whole conversation"
            )
        copies, remainder = divmod(batch, rows) if rows else (0, 1)
        if remainder or not copies or (start == 0 and length > positions):
            self._raise_shape_mismatch(batch, length)
        if copies > 1 and start < positions and not _is_repeated(inputs, copies):
            self._raise_shape_mismatch(batch, length)
        if start and self.rows.stop and copies != self.copies:
            self._raise_shape_mismatch(batch, length)
        self.rows, self.copies = slice(0, rows), copies
        self.labels = self._with_generated(self.tokens).to(inputs.device)

    def _with_generated(self, tokens: TokenMap) -> Int[Tensor, "batch stop"]:
        """Return the groups of all positions so far, generated ones among them, for each row of the call."""
        generated_count = max(self.stop - tokens.labels.shape[1], 0)
        labels = nn.functional.pad(tokens.labels, (0, generated_count), value=tokens.index(tokens.generated))
        return labels[:, : self.stop].repeat_interleave(self.copies, dim=0)

    def _before_prefusion_call(self, prefusion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._require_one_thread()
        visual, text = (
            args[index] if len(args) > index else kwargs[name] for index, name in enumerate(("visual", "text"))
        )
        if kwargs.get("past") is not None:
            raise ValueError(
                "images that are encoded in advance skip pre-fusion's visual tokens; pass pixel_values to probe them"
            )
        batch, length = visual.shape[0], visual.shape[1] + text.shape[1]
        rows = self.tokens.labels.shape[0]
        first = self.rows.stop if self.rows.stop < rows else 0
        self.rows, self.stop = slice(first, first + batch), length
        labels = self.tokens.labels[self.rows].to(visual.device)
        if len(labels) != batch or labels.shape[1] < length or (labels[:, length:] != self.tokens.index("pad")).any():
            self._raise_shape_mismatch(batch, length)
        self.labels, self.padded = labels[:, :length], labels.shape[1] > length

    def _raise_shape_mismatch(self, batch: int, length: int) -> None:
        rows, positions = self.tokens.labels.shape
        callee, advice = "the language model", ", and generate with a cache and without an assistant"
        if self.tokens.stack == "prefusion":
            callee, advice = "pre-fusion", ""
        raise ValueError(
            f"the token map has {rows} x {positions} positions (batch x length), but {callee} was called "
            f"with {batch} x {length}; build the map from the inputs of this call{advice}"
        )

    def _require_one_thread(self) -> None:
        thread = threading.get_ident()
        if self._thread not in (None, thread):
            raise RuntimeError("a second thread calls a model that is being probed; use one model per thread")
        self._thread = thread


def _run_all_positions(decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Make the last layers of Gemma 4 run on all positions of the call, not only on those whose logits are needed."""
    return args, kwargs | {"logits_to_keep": 0}


def _continues_other_text(start: int, length: int, positions: int) -> bool:
    """Return whether a call on a cache from before the block is rather the text of the map than a continuation of it.

    A map of the last turn of a conversation alone would label the cached turns as that turn.

    Args:
        start: Positions in the cache.
        length: Positions of the call, one for a step of generation.
        positions: Positions of the token map.
    """
    return length > 1 and (start > positions or start == length == positions)


def _is_repeated(inputs: Tensor, copies: int) -> bool:
    """Return whether each row occurs `copies` times in sequence, up to the rounding of images encoded repeatedly.

    Each position is judged by its own size: features of images can be a hundred times those of words, so that a bound
    common to all positions would take one word for another.
    """
    rows = inputs.unflatten(0, (-1, copies)).float()
    if not inputs.is_floating_point():  # token ids
        return bool((rows == rows[:, :1]).all())
    difference = (rows - rows[:, :1]).abs().amax(-1)
    return bool((difference <= 0.05 * rows.abs().amax(-1)).all())
