"""Decoder layers run again on some positions alone, beside what a first run made of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import reduce
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from probes.hooks.decoder import cache_name, decoder_layers
from probes.hooks.layer_io import (
    explicit,
    hidden_of,
    hidden_states,
    key_length,
    replace_hidden,
    shortened,
    visible,
    with_hidden,
)
from probes.hooks.partial_call import Cut, can_cut, cut_of, kept_first, set_cut

# What layers of a call share is made for each kind of mask: of those that slide, and of those under an intervention.
_KINDS = 4


def put_forward(layer: nn.Module, forward: Any, stack: ExitStack) -> None:
    """Has the layer run `forward` until `stack` closes, innermost of its hooks; then it has its own again.

    One that a library put on the module, as accelerate does where weights are offloaded, is its own too.
    """
    before = vars(layer).get("forward")
    layer.forward = forward
    if before is None:
        stack.callback(delattr, layer, "forward")
    else:
        stack.callback(setattr, layer, "forward", before)


class Rows:
    """Which positions repeated calls run, in the layers from `first` on.

    The first call runs whole; keys, values and states of all its positions are kept. Inside `alone` a layer is called
    on `rows`, and on every position that sees one of them in some layer or sees one that does: what any other position
    makes is then what it made at first, and its keys and values go beside the new ones.

    Raises:
        ValueError: Layers that cannot be cut, rows that are not of the call's shape, an intervention inside `alone`
            that changes other positions, or one that drops tokens.
    """

    def __init__(self, decoder: nn.Module, first: int, rows: Bool[Tensor, "batch positions"]) -> None:
        if not can_cut(decoder):
            raise ValueError(f"the layers of {type(decoder).__name__} cannot run on some rows alone: leave `rows` out")
        layers = decoder_layers(decoder)
        self.rows = rows
        self.layers = [_Layer(number, layers[number], self) for number in range(first, len(layers))]
        self.cut: Cut | None = None
        self.active = False
        self._made: list[tuple[tuple[Any, ...], Any]] = []

    def install(self, stack: ExitStack) -> None:
        """Until `stack` closes."""
        for each in self.layers:
            put_forward(each.layer, each.run, stack)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Once the first call is over, calls inside run the rows alone."""
        self.active = self.cut is not None
        try:
            yield
        finally:
            self.active = False
            self._made.clear()

    def close(self) -> None:
        """The first call is over: what each position sees is known."""
        sees = reduce(torch.logical_or, {id(each.seen): each.seen for each in self.layers}.values())[:, 0]
        left = ~_closure(self.rows.to(sees.device), sees)
        queries, filler = kept_first(left)
        keys = torch.arange(left.shape[1], device=left.device).expand_as(left)
        self.cut = Cut(queries, filler, keys, torch.zeros_like(left), left.shape[1])
        # What nobody sees, padding for one, may be anything.
        self.watched = left & sees.any(dim=1)

    def once(self, make: Callable[[], Any], *inputs: Any) -> Any:
        """What `make` gives; the same again for the same objects `inputs`, which the layers of a call share."""
        for known, result in self._made:
            if len(known) == len(inputs) and all(a is b for a, b in zip(known, inputs, strict=True)):
                return result
        self._made = [*self._made[1 - _KINDS :], (inputs, make())]
        return self._made[-1][1]


def _closure(
    rows: Bool[Tensor, "batch positions"], sees: Bool[Tensor, "#batch positions positions"]
) -> Bool[Tensor, "batch positions"]:
    """The rows, those that see one of them, those that see one of these, and so on."""
    while True:
        grown = rows | (sees & rows[:, None, :]).any(dim=-1)
        if torch.equal(grown, rows):
            return rows
        rows = grown


class _Layer:
    """A layer's part: what it was called with at first, what it made; and what its calls have for a cache (`update`)."""

    def __init__(self, number: int, layer: nn.Module, rows: Rows) -> None:
        self.number, self.layer, self.rows = number, layer, rows
        self.forward = layer.forward
        self.kept: tuple[Tensor, Tensor] | None = None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the layer's forward."""
        if self.rows.cut is None:
            return self._first(args, kwargs)
        return self._again(args, kwargs) if self.rows.active else self.forward(*args, **kwargs)

    def _first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, mask = hidden_states(args, kwargs), kwargs["attention_mask"]
        shape, keys = list(self.rows.rows.shape), key_length(self.layer, args, kwargs)
        if list(hidden.shape[:2]) != shape or keys != shape[1]:
            raise ValueError(
                f"rows are of shape {shape}, the call has {list(hidden.shape[:2])} positions (batch x length) and {keys} "
                "keys: build them from the inputs of this very call, and call without a cache"
            )
        self.seen = self.rows.once(lambda: visible(explicit(self.layer, mask, hidden, keys)), mask)
        self.hidden, self.kept = hidden, None
        output = self.forward(*args, **kwargs | {cache_name(kwargs): self})
        self.output = hidden_of(output)
        if self.kept is None:
            raise ValueError(f"{type(self.layer).__name__} gives its keys to no cache: leave `rows` out")
        if self is self.rows.layers[-1]:
            self.rows.close()
        return output

    def _again(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rows, hidden = self.rows, hidden_states(args, kwargs)
        if cut_of(self.layer) is not None:
            raise ValueError(f"layer {self.number} runs some rows alone and cannot drop tokens: leave `rows` out")
        check_same_call(hidden, self.hidden)
        if ((hidden != self.hidden).any(dim=-1) & rows.watched).any():
            raise ValueError(_changed(self.number, "comes in at"))
        mask, embeddings = kwargs["attention_mask"], kwargs["position_embeddings"]
        fewer = rows.once(lambda: self._on_rows(hidden, kwargs), mask, embeddings)
        cut = rows.cut
        assert cut is not None
        args, kwargs = replace_hidden(args, kwargs | fewer | {cache_name(kwargs): self}, cut.rows(hidden))
        set_cut(self.layer, cut)
        try:
            output = self.forward(*args, **kwargs)
        finally:
            set_cut(self.layer, None)
        short = hidden_of(output)
        index = cut.queries[..., None].expand_as(short)
        short = torch.where(cut.filler[..., None], self.output.gather(1, index), short)
        return with_hidden(output, self.output.scatter(1, index, short))

    def _on_rows(self, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        mask = explicit(self.layer, kwargs["attention_mask"], hidden, hidden.shape[1])
        if ((visible(mask) != self.seen) & self.rows.watched[:, None, :, None]).any():
            raise ValueError(_changed(self.number, "is seen from"))
        assert self.rows.cut is not None
        return shortened(self.rows.cut, mask, kwargs)

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions, `[batch, heads, positions, width]`, from the call's own."""
        if self.kept is None:
            self.kept = key, value
            return key, value
        assert self.rows.cut is not None
        index = self.rows.cut.queries[:, None, :, None]
        whole = [kept.scatter(2, index.expand_as(new), new) for kept, new in zip(self.kept, (key, value), strict=True)]
        return whole[0], whole[1]


def check_same_call(hidden: Float[Tensor, ...], first: Float[Tensor, ...]) -> None:
    """Raises ValueError where a repeated call is of another shape than the first."""
    if hidden.shape != first.shape:
        raise ValueError(
            f"a call of {list(hidden.shape)} (batch, length, width) cannot take up where one of {list(first.shape)} was"
        )


def _changed(number: int, what: str) -> str:
    return f"layer {number}: what {what} positions outside `rows` is not as in the first call: name all that change"
