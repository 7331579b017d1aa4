from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from probes.pruning import random_drop
from probes.pruning.random_drop import removed_at_random
from probes.tokens.token_map import TokenMap
from tests.probes.pruning.rows import TEXTS, assert_rows_independent, removed_in

Inputs = dict[str, torch.Tensor]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.95])
def test_random_drop_keeps_exact_number_of_visual_tokens(
    make_llama: Callable[..., Any], rows: Callable[[str], Inputs], side: str, keep: float
) -> None:
    model, inputs = make_llama(), rows(side)
    (removed,) = removed_in(model, inputs, lambda model, tokens: random_drop(model, tokens, 1, keep))
    vision = TokenMap.from_inputs(model, inputs).mask("vision")
    assert not (removed & ~vision).any()
    asked = [math.floor(keep * visual) for _, visual, _ in TEXTS]
    assert (vision & ~removed).sum(dim=1).tolist() == asked
    assert_rows_independent(model, inputs, lambda model, tokens: random_drop(model, tokens, 1, keep))


def test_random_drop_of_smaller_share_is_a_subset(
    make_llama: Callable[..., Any], rows: Callable[[str], Inputs]
) -> None:
    model, inputs = make_llama(), rows("left")
    removed = [
        removed_in(model, inputs, lambda model, tokens, keep=keep: random_drop(model, tokens, 1, keep))[0]
        for keep in (0.2, 0.4, 0.8)
    ]
    assert (removed[0] | removed[1]).equal(removed[0])
    assert (removed[1] | removed[2]).equal(removed[1])


def test_random_drop_of_many_seeds_keeps_every_token_equally_often(
    make_llama: Callable[..., Any], rows: Callable[[str], Inputs]
) -> None:
    """2,000 seeds keep 5 of 20 tokens: each is kept 500 times, with a standard deviation of 19."""
    model, inputs = make_llama(), rows("left")
    vision = TokenMap.from_inputs(model, inputs).mask("vision")[:1]
    kept = Counter[int]()
    for seed in range(2000):
        kept.update((vision & ~removed_at_random(vision, 0.25, seed))[0].nonzero()[:, 0].tolist())
    assert len(kept) == 20
    assert all(abs(count - 500) < 100 for count in kept.values())


def test_random_drop_at_every_layer_runs_layers_on_fewer_tokens(make_llama: Callable[..., Any], make_rows: Any) -> None:
    model = make_llama()
    inputs = make_rows([(3, 20, 6)], "left")
    del inputs["pixel_values"]
    sizes: list[int] = []
    for layer in model.get_decoder().layers:
        layer.mlp.register_forward_pre_hook(lambda mlp, args: sizes.append(args[0].shape[1]))
    removed_in(model, inputs, lambda model, tokens: random_drop(model, tokens, 0, 0.5))
    removed_in(model, inputs, lambda model, tokens: random_drop(model, tokens, 2, 0.25))
    assert sizes == [19, 19, 19, 29, 29, 14]


@pytest.mark.parametrize(
    ("layer", "keep", "message"), [(5, 0.5, "outside"), (1, 1.0, r"keep=1\.0"), (1, -0.5, r"keep=-0\.5")]
)
def test_random_drop_with_invalid_arguments_raises(
    make_llama: Callable[..., Any], rows: Callable[[str], Inputs], layer: int, keep: float, message: str
) -> None:
    model, inputs = make_llama(), rows("left")
    with pytest.raises((ValueError, RuntimeError), match=message):
        removed_in(model, inputs, lambda model, tokens: random_drop(model, tokens, layer, keep))
