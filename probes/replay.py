"""Runs that differ from a certain layer on share the layers ahead of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from probes.decoder import decoder_layers, find_decoder, select_layers
from probes.states import hidden_of, hidden_states

Since = Callable[[int], AbstractContextManager[None]]


@contextmanager
def replay(model: PreTrainedModel, starts: Iterable[int]) -> Iterator[Since]:
    """Repeats one forward call from some layer on.

    The first call inside runs whole, and what the layers ahead of each of `starts` gave is kept. From then on, inside
    `since(start)`, the same call takes up at that layer: those ahead of it do not run, whatever hooks they have. So
    interventions in layers of which the first is `start` cost the rest of the model alone:

    ```python
    with replay(model, range(layers)) as since:
        for start in reversed(range(layers)):  # the last first: it is intact ahead of all others
            with since(start), intervene(model, tokens, RemoveTokens("vision", range(start, layers))):
                model(**inputs)
    ```

    The first call must be intact ahead of every start that is gone back to. The cache that a repeated call leaves is of
    no use. It holds what a layer gives for the whole batch, for each start but 0, where the model is.

    Yields:
        `since`. Inside it, a call of another shape than the first raises ValueError.

    Raises:
        ValueError: a start outside the model. As many as it has layers is none: then all of them have run.
    """
    layers = decoder_layers(decoder := find_decoder(model))
    wanted = {start for start in starts if start != len(layers)}
    given: dict[int, Any] = {}

    def since(start: int) -> AbstractContextManager[None]:
        return _instead(layers[:start], given[start]) if start in given else nullcontext()

    with ExitStack() as stack:
        for start in select_layers(decoder, wanted):
            if start:

                def keep(layer: nn.Module, args: Any, output: Any, start: int = start) -> None:
                    given.setdefault(start, output)

                stack.callback(layers[start - 1].register_forward_hook(keep).remove)
        yield since


@contextmanager
def _instead(layers: list[nn.Module], output: Any) -> Iterator[None]:
    """The layers give `output` and do nothing."""
    shape = hidden_of(output).shape

    def forward(*args: Any, **kwargs: Any) -> Any:
        if (found := hidden_states(args, kwargs).shape) != shape:
            raise ValueError(
                f"a call of {list(found)} (batch, length, width) cannot take up where one of {list(shape)} was"
            )
        return output

    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            if before is None:
                del layer.forward
            else:
                layer.forward = before
