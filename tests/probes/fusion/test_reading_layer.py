"""The reading layer: against closed forms, and models with a known answer."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch

from probes.fusion.planted_models import ANSWER_IDS, planted
from probes.fusion.reading_layer import reading_layer, share_of_assignments
from probes.interventions.swapping import Swaps, swap_images

WORDS = np.array([11, 12, 13, 14])


def swaps_from_moves(moved: np.ndarray, total: float = 8.0) -> Swaps:
    """Return swaps of pairs, all right, whose differences are `moved` `[layers + 1, pairs]` of the way to the other answer.

    The intact runs have differences of -total / 2. The answers take turns over four words.
    """
    pairs = moved.shape[1]
    answers = np.stack([WORDS[np.arange(pairs) % 4], WORDS[(np.arange(pairs) + 1) % 4]], axis=1)
    difference = np.repeat((moved * total - total / 2)[..., None], 2, axis=2)
    return Swaps(answers, difference, np.where(difference > 0, answers[:, ::-1], answers))


def repeat(*moved: float, pairs: int = 20) -> np.ndarray:
    return np.repeat(np.array(moved)[:, None], pairs, axis=1)


@pytest.mark.parametrize("layer", range(1, 6))
def test_reading_layer_of_step_is_step(layer: int) -> None:
    result = reading_layer(swaps_from_moves(repeat(*[float(k < layer) for k in range(6)])))
    assert (result.layer, result.low, result.high, result.reads) == (layer, layer, layer, (layer,))
    assert (result.layers, result.pairs, result.right) == (5, 20, 20)
    assert result.moved == result.moved_low == result.moved_high == result.flipped
    assert json.loads(json.dumps(dataclasses.asdict(result)))["layer"] == layer


def test_reading_layer_of_gradual_move_is_first_point_below_half() -> None:
    result = reading_layer(swaps_from_moves(repeat(1, 0.95, 0.5, 0.3, 0)))
    assert (result.layer, result.reads) == (3, (2, 3, 4))
    assert result.moved == pytest.approx((1, 0.95, 0.5, 0.3, 0))
    assert result.flipped == (1, 1, 0, 0, 0), "an answer that is as likely is not the most likely"


def test_reading_layer_with_later_return_is_after_it() -> None:
    assert reading_layer(swaps_from_moves(repeat(1, 0.2, 0.7, 0))).layer == 3


def test_reading_layer_before_first_layer_is_0() -> None:
    """The other visual tokens do not move the answer: the text was read before."""
    assert reading_layer(swaps_from_moves(repeat(0.4, 0.1, 0))).layer == 0


def test_reading_layer_weighs_pairs_by_their_whole_move() -> None:
    """Two kinds of pairs, of moves 6 and 2, step at 1 and at 3: at k = 1 the share is 2 / (6 + 2)."""
    first, second = swaps_from_moves(repeat(1, 0, 0, 0), 6.0), swaps_from_moves(repeat(1, 1, 1, 0), 2.0)
    assert reading_layer(Swaps.join([first, second])).moved == pytest.approx((1, 0.25, 0.25, 0))


def test_reading_layer_uses_both_directions() -> None:
    """One direction steps at 1, the other at 2."""
    swaps = swaps_from_moves(repeat(1, 0, 0))
    swaps.difference[1, :, 1] = swaps.difference[0, :, 1]
    assert reading_layer(swaps).moved == pytest.approx((1, 0.5, 0))


def test_reading_layer_leaves_out_pairs_with_a_wrong_answer() -> None:
    swaps = swaps_from_moves(np.concatenate([repeat(1, 1, 0), repeat(1, 0, 0)], axis=1))
    swaps.predicted[-1, 20:, 1] = 3
    result = reading_layer(swaps)
    assert (result.layer, result.pairs, result.right) == (2, 40, 20)
    assert str(result) == "layer 2 of 2 (95% CI 2 to 2, 20 of 40 pairs right, swaps)"


def test_reading_layer_interval_contains_truth_of_noisy_step() -> None:
    """Shares of 0.8 and of 0.2 around a step at 3, with noise of 1. Of 60 draws, at most 6 intervals may miss."""
    draw = np.random.default_rng(0)
    step = np.where(np.arange(7) < 3, 0.8, 0.2)
    hits = widths = 0
    for _ in range(60):
        moved = step[:, None] + draw.normal(size=(7, 60))
        moved[0], moved[-1] = 1, 0
        result = reading_layer(swaps_from_moves(moved), resamples=400)
        low, high = result.low or 0, result.high or 0
        hits += low <= 3 <= high
        widths += high > low
    assert hits >= 54
    assert widths > 0


def test_reading_layer_of_few_right_pairs_is_none() -> None:
    result = reading_layer(swaps_from_moves(repeat(1, 0, pairs=9)))
    assert (result.layer, result.low, result.moved) == (None, None, ())
    assert str(result) == "none of 1 layers (9 of 9 pairs right, swaps)"


@pytest.mark.parametrize(("words", "chance"), [(2, 1 / 2), (3, 1 / 6), (4, 1 / 24), (5, 1 / 120)])
def test_share_of_assignments_of_right_answers_is_one_permutation(words: int, chance: float) -> None:
    answers = np.array([(i, (i + 1) % words) for i in range(words)] * 6)
    swaps = Swaps(answers, np.zeros((2, len(answers), 2)), np.array([answers, answers]))
    assert share_of_assignments(swaps) == pytest.approx(chance)


def test_share_of_assignments_counts_assignments_that_are_as_good() -> None:
    """Pairs (0, 1) and (2, 3) are named (1, 0) and (2, 3): two permutations get half of the pairs, one gets all."""
    answers = np.array([(0, 1), (2, 3)] * 10)
    named = np.array([(1, 0), (2, 3)] * 10)
    swaps = Swaps(answers, np.zeros((2, 20, 2)), np.array([named, named]))
    # With 2 and 3 fixed there are 2 permutations, with 0 and 1 exchanged 2; one of each kind is the same.
    assert share_of_assignments(swaps) == pytest.approx(3 / 24)


@pytest.mark.parametrize("layers", [4, 6])
def test_reading_layer_tells_two_planted_properties_apart(layers: int) -> None:
    """Every pair of layers: red is read in the first, blue in the second, to the layer."""
    for first in range(1, layers):
        for second in range(first + 1, layers + 1):
            model = planted((first, second), layers)
            for changed, layer in (("red", first), ("blue", second)):
                result = reading_layer(swap_images(*model.pairs(12, changed).arguments), resamples=100)  # type: ignore[arg-type]
                assert (result.layer, result.low, result.high, result.reads) == (layer, layer, layer, (layer,))


def test_reading_layer_of_property_read_twice_names_both_layers() -> None:
    """Each of two layers adds what it reads to the answer, so half of the move is left between them."""
    model = planted(2, layers=5)
    layers = model.model.model.language_model.layers
    layers[3].self_attn.load_state_dict(copy.deepcopy(layers[1].self_attn.state_dict()))
    result = reading_layer(swap_images(*model.pairs(12, "red").arguments))
    assert result.moved == pytest.approx((1, 1, 0.5, 0.5, 0, 0), abs=1e-3)
    assert result.reads == (2, 4)


def test_reading_layer_of_text_only_control_is_none() -> None:
    assert reading_layer(swap_images(*planted(None, layers=4).pairs(40, changed="red").arguments)).layer is None


def test_reading_layer_of_random_weights_is_none_in_95_percent() -> None:
    """Random heads on the planted vision: every image gets one of the four colours, which often follows the image."""
    pairs = planted((2, 3), layers=4).pairs(40, changed="red")
    head = pairs.model.get_output_embeddings().weight
    located = moves = 0
    for seed in range(100):
        torch.manual_seed(seed)
        head[list(ANSWER_IDS)] = 40 * torch.randn(len(ANSWER_IDS), head.shape[1])
        swaps = swap_images(*pairs.arguments)
        located += reading_layer(swaps, resamples=20).layer is not None
        moves += bool((swaps.predicted[-1, :, 0] != swaps.predicted[-1, :, 1]).any())
    assert moves > 30, "answers depend on the image in many of these models"
    assert located <= 10, "5% of 100, with luck: the 97.5% quantile"
