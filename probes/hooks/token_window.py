"""The positions of a token map that one forward call covers."""

from __future__ import annotations

import threading
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from probes.hooks.decoder import cache_name, decoder_layers
from probes.tokens.token_map import TokenMap


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
