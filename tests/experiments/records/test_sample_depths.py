"""Fusion depth of single samples, against the depth of a set that repeats one sample, and against the formula by loops."""

import inspect
import itertools

import numpy as np
import pytest

from experiments.records import sample_depths
from experiments.records.sample_depths import (
    attention_depths,
    image_attention,
    knockout_depths,
    onset_layers,
    outcomes_with_and_without_image,
    removal_depths,
)
from probes import fusion_depth, fusion_onset
from probes.fusion.depth import ATTENTION_FLOOR

LAYERS = 4


def digits(outcomes):
    return "".join(str(int(outcome)) for outcome in outcomes)


def removal(curves, block=1):
    """The part `removal` from outcomes [points, samples]."""
    starts = [*range(0, LAYERS, block), LAYERS]
    layers = [list(range(start, LAYERS)) for start in starts]
    return {"onward": [{"layers": k, "correct": digits(row)} for k, row in zip(layers, curves, strict=True)]}


def onset(curves, block=1):
    """The part `onset` from outcomes [points, samples]."""
    ends = [*range(0, LAYERS, block), LAYERS]
    layers = [list(range(end)) for end in ends]
    return {"upto": [{"layers": k, "correct": digits(row)} for k, row in zip(layers, curves, strict=True)]}


def knockout(curves, width):
    """The part `knockout` from outcomes [points, samples]."""
    windows = [list(range(max(end - width, 0), min(end, LAYERS))) for end in range(1, LAYERS + width)]
    return {"windows": [{"layers": k, "correct": digits(row)} for k, row in zip([[], *windows], curves, strict=True)]}


def attention(mass):
    return {"pairs": [["response", "vision"], ["instruction", "vision"]], "mass": [(mass * 0).tolist(), mass.tolist()]}


def all_curves(points):
    """Every curve of outcomes, [points, 2 ** points]."""
    return np.array(list(itertools.product([0, 1], repeat=points))).T


def test_removal_depths_of_every_curve_are_those_of_a_set_that_repeats_the_sample():
    curves = all_curves(LAYERS + 1)
    for curve, depth in zip(curves.T, removal_depths(removal(curves)), strict=True):
        if curve[-1] and not curve[0]:
            assert depth == fusion_depth(np.stack([curve, curve], 1), "removal").depth
        else:
            assert depth is None


def test_onsets_of_every_curve_are_those_of_a_set_that_repeats_the_sample():
    curves = all_curves(LAYERS + 1)
    for curve, layer in zip(curves.T, onset_layers(onset(curves)), strict=True):
        assert layer == fusion_onset(np.stack([curve, curve], 1)).onset


@pytest.mark.parametrize("width", [1, 2, 3])
def test_knockout_depths_of_every_curve_are_those_of_a_set_that_repeats_the_sample(width):
    curves = all_curves(LAYERS + width)
    for curve, depth in zip(curves.T, knockout_depths(knockout(curves, width)), strict=True):
        repeated = fusion_depth(np.stack([curve, curve], 1), "knockout", width=width).depth
        assert depth == (repeated if curve[0] else None)


def test_attention_depths_are_those_of_a_set_that_repeats_the_sample():
    mass = np.random.default_rng(0).dirichlet(np.full(LAYERS, 0.5), size=40).T * 0.4
    mass[:, 0], mass[:, 1], mass[:, 2] = 0.0005, np.nan, [0.5, 0, 0, 0]
    depths = attention_depths(attention(mass))
    expected = [fusion_depth(np.stack([column, column], 1), "attention").depth for column in mass.T]
    assert depths == expected
    assert depths[:3] == [None, None, 1]


def test_constants_are_those_of_the_depth_of_a_set():
    assert sample_depths.ATTENTION_FLOOR == ATTENTION_FLOOR
    assert inspect.signature(fusion_depth).parameters["threshold"].default == sample_depths.THRESHOLD


def test_blocks_of_layers_give_measured_layers():
    curves = np.array([[0], [1], [1]])  # hidden from layers 0, 2 and 4 on
    assert removal_depths(removal(curves, block=2)) == [2]
    assert onset_layers(onset(1 - curves, block=2)) == [1]
    assert onset_layers(onset(np.array([[1], [1], [0]]), block=2)) == [3]


@pytest.mark.parametrize("seed", range(20))
def test_depth_of_a_set_without_relapses_is_a_quantile_of_its_samples_depths(seed):
    random = np.random.default_rng(seed)
    found_after = random.integers(1, LAYERS + 1, size=60)
    curves = (np.arange(LAYERS + 1)[:, None] >= found_after).astype(int)
    curves[:, :5], curves[:, 5:12] = 0, 1  # always wrong, always right
    depths = [depth for depth in removal_depths(removal(curves)) if depth is not None]
    assert len(depths) == 48
    assert fusion_depth(curves, "removal").depth == np.quantile(depths, 0.9, method="inverted_cdf")
    late = 1 - curves
    layers = [layer for layer in onset_layers(onset(late)) if layer is not None]
    assert fusion_onset(late).onset == np.quantile(layers, 0.1, method="inverted_cdf")


def test_outcomes_with_and_without_the_image_come_from_any_part():
    right, blind = [1, 1, 0], [1, 0, 0]
    middle = np.ones((LAYERS - 1, 3), int)
    parts = {
        "removal": removal([blind, *middle, right]),
        "onset": onset([right, *middle, blind]),
        "knockout": knockout([right, *middle, right], 1),
    }
    for name, part in parts.items():
        with_image, without = outcomes_with_and_without_image({name: part})
        assert with_image.tolist() == [True, True, False]
        assert without is None if name == "knockout" else without.tolist() == [True, False, False]
    assert outcomes_with_and_without_image({}) == (None, None)


def test_image_attention_is_the_pair_from_instruction_to_vision():
    mass = np.array([[0.5, 0.25]])
    assert image_attention(attention(mass)) == [[0.5, 0.25]]
