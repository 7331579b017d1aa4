"""Runs that differ from a certain layer on share the layers ahead of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.hooks.decoder import decoder_layers, find_decoder, select_layers
from probes.hooks.layer_io import hidden_of, hidden_states
from probes.hooks.subset_rerun import Rows, check_same_call, put_forward

Since = Callable[[int], AbstractContextManager[None]]


@contextmanager
def replay(
    model: PreTrainedModel, starts: Iterable[int], rows: Bool[Tensor, "batch positions"] | None = None
) -> Iterator[Since]:
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

    With `rows`, the layers from `start` on run on these positions alone, and on those that they can change, beside the
    keys and values that the others had in the first call; whatever the calls inside `since` do, they do it at `rows`.
    The others leave the layers as in the first call, as does padding. Hooks see whole sequences around a layer, the
    rows inside it; `record_attention` records the queries that run, and attention or MLP of others cannot be patched.
    The first call must be intact throughout for these others, and is called without a cache of earlier tokens. States,
    keys and values of all positions and layers from the first start on are held, where the model is.

    Args:
        model: A transformers model with a decoder.
        starts: Layers that repeated calls will take up at.
        rows: Positions of the language model's call that repeated calls change directly: for text cut off from the
            picture, the text behind it. All by default.

    Yields:
        `since`. Inside it, a call of another shape than the first raises ValueError; with `rows`, so do an intervention
        that changes other positions, and one that drops tokens.

    Raises:
        ValueError: a start outside the model, or `rows` for a model whose layers cannot run on some alone. As many as
            it has layers is none: then all of them have run.
    """
    layers = decoder_layers(decoder := find_decoder(model))
    wanted = select_layers(decoder, {start for start in starts if start != len(layers)})
    cut = None if rows is None or not wanted else Rows(decoder, wanted[0], rows)
    given: dict[int, Any] = {}
    done = False

    def finish(*call: Any) -> None:
        nonlocal done
        done = True

    @contextmanager
    def since(start: int) -> Iterator[None]:
        with ExitStack() as stack:
            for layer in layers[:start] if done and start in given else ():
                put_forward(layer, partial(_instead, given[start]), stack)
            if cut is not None and start in wanted:
                stack.enter_context(cut.alone())
            yield

    with ExitStack() as stack:
        if cut is not None:
            cut.install(stack)
        for start in wanted:
            if start:

                def keep(layer: nn.Module, args: Any, output: Any, start: int = start) -> None:
                    if not done:
                        given[start] = output

                stack.callback(layers[start - 1].register_forward_hook(keep).remove)
        stack.callback(layers[-1].register_forward_hook(finish).remove)
        yield since


def _instead(output: Any, *args: Any, **kwargs: Any) -> Any:
    """What a layer that does not run gives."""
    check_same_call(hidden_states(args, kwargs), hidden_of(output))
    return output
