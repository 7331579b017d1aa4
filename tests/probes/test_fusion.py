from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from probes import fusion_depth

LAYERS = 6


def step(depth: int, samples: int = 40) -> np.ndarray:
    """Right with vision in the first `depth` layers, wrong with less."""
    return np.repeat((np.arange(LAYERS + 1) >= depth).astype(float)[:, None], samples, axis=1)


@pytest.mark.parametrize("depth", range(1, LAYERS + 1))
def test_removal_finds_every_step(depth: int) -> None:
    found = fusion_depth(step(depth), "removal")
    assert (found.depth, found.low, found.high) == (depth, depth, depth)
    assert (found.layers, found.samples) == (LAYERS, 40)
    assert found.curve == tuple(float(k >= depth) for k in range(LAYERS + 1))


@pytest.mark.parametrize("depth", range(1, LAYERS + 1))
def test_attention_finds_every_step(depth: int) -> None:
    """All mass evenly in the first `depth` layers: at threshold 1 they are all needed."""
    mass = np.repeat((np.arange(LAYERS) < depth).astype(float)[:, None], 10, axis=1) / depth
    assert fusion_depth(mass, "attention", threshold=1.0).depth == depth


@pytest.mark.parametrize(("threshold", "depth"), [(0.5, 1), (0.51, 2), (0.75, 2), (0.9, 4), (0.9375, 4), (0.95, 5)])
def test_attention_of_a_geometric_series(threshold: float, depth: int) -> None:
    """Layer l holds 2^-(l+1), so the first k hold 1 - 2^-k (over nearly 1)."""
    mass = np.repeat(0.5 ** np.arange(1, 41)[:, None], 3, axis=1)
    assert fusion_depth(mass, "attention", threshold=threshold).depth == depth


def test_threshold_is_reached_in_spite_of_rounding() -> None:
    mass = np.array([[0.01], [0.12], [0.13 / 9]]).repeat(2, axis=1)
    assert (0.01 + 0.12) / mass[:, 0].sum() < 0.9, "though it is 0.9 exactly"
    assert fusion_depth(mass, "attention", threshold=0.9).depth == 2


def test_a_later_dip_moves_the_depth_behind_it() -> None:
    curve = np.array([0.0, 1.0, 0.5, 1.0, 1.0])[:, None].repeat(20, axis=1)
    assert fusion_depth(curve, "removal").depth == 3


def test_the_floor_is_chance_not_zero() -> None:
    """From 0.5 (guessing) to 0.9: at 0.85 the share is 0.875, below the threshold; at 0.87, 0.925."""
    curve = np.array([0.5, 0.5, 0.85, 0.87, 0.9])[:, None].repeat(20, axis=1)
    assert fusion_depth(curve, "removal").depth == 3
    assert fusion_depth(curve, "removal", threshold=0.875).depth == 2


@pytest.mark.parametrize("seed", range(3))
def test_text_only_controls_have_no_depth(seed: int) -> None:
    """Scores that do not depend on the picture: constant ones, and pure noise."""
    noise = np.random.default_rng(seed).integers(0, 2, size=(LAYERS + 1, 300))
    for control in (np.ones((LAYERS + 1, 300)), noise):
        found = fusion_depth(control, "removal")
        assert (found.depth, found.low, found.high) == (None, None, None)
        assert str(found) == "none of 6 layers (n=300, removal)"


def test_no_attention_has_no_depth() -> None:
    for mass, samples in ((np.zeros((LAYERS, 5)), 5), (np.full((LAYERS, 5), np.nan), 0)):
        found = fusion_depth(mass, "attention")
        assert (found.depth, found.samples) == (None, samples)


def test_samples_without_a_picture_are_left_out() -> None:
    mass = np.array([[0.8, np.nan, 0.8], [0.1, np.nan, 0.1], [0.1, np.nan, 0.1]])
    found = fusion_depth(mass, "attention", threshold=0.8)
    assert (found.depth, found.samples) == (1, 2)
    assert found.curve == pytest.approx((0.8, 0.1, 0.1))


def noisy(samples: int, seed: int) -> np.ndarray:
    """Bernoulli scores whose rate climbs linearly with k, so that neighbours are hard to tell apart."""
    rate = np.linspace(0.3, 0.9, LAYERS * 4 + 1)[:, None]
    return (np.random.default_rng(seed).random((LAYERS * 4 + 1, samples)) < rate).astype(float)


def test_fewer_noisy_samples_widen_the_interval() -> None:
    few, many = fusion_depth(noisy(60, 0), "removal"), fusion_depth(noisy(20_000, 0), "removal", resamples=200)
    assert many.depth == 22  # r(k) = k / 24 reaches 0.9 at 21.6
    assert many.high - many.low <= 1 < few.high - few.low
    assert few.low <= few.depth <= few.high


def test_interval_covers_the_truth() -> None:
    """In 95% of experiments; binomially, 50 or more of 60 with probability above 0.999."""
    found = [fusion_depth(noisy(400, seed), "removal", resamples=300) for seed in range(60)]
    assert sum(f.low <= 22 <= f.high for f in found) >= 50


def test_chunked_resampling_covers_all_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator draws row by row, so chunks continue the same stream."""
    whole = fusion_depth(noisy(50, 1), "removal")
    monkeypatch.setattr("probes.fusion.WEIGHTS_PER_CHUNK", 50 * 7)
    assert fusion_depth(noisy(50, 1), "removal") == whole


def test_seeded_and_plain() -> None:
    scores = noisy(50, 2)
    first = fusion_depth(scores, "removal", seed=3)
    assert fusion_depth(scores, "removal", seed=3) == first
    assert json.loads(json.dumps(dataclasses.asdict(first)))["depth"] == first.depth
    assert str(fusion_depth(step(3, 1200), "removal")) == "3 of 6 layers (95% CI 3 to 3, n=1200, removal)"


@pytest.mark.parametrize(
    ("values", "kind", "options", "message"),
    [
        (np.zeros((3, 2)), "knockout", {}, "kind is 'knockout': it must be 'removal' or 'attention'"),
        (np.zeros(3), "removal", {}, r"values have shape \[3\]: removal needs \[layers \+ 1, samples\]"),
        (np.zeros((1, 4)), "removal", {}, r"removal needs \[layers \+ 1, samples\]"),
        (np.zeros((3, 0)), "attention", {}, r"attention needs \[layers, samples\]"),
        (np.array([[0.0, np.nan], [1.0, np.nan]]), "attention", {}, "a single sample"),
        (np.array([[0.0], [np.nan]]), "removal", {}, "a score that is not finite"),
        (np.array([[0.5], [np.nan]]), "attention", {}, "sample 0 has NaN mass in some layers only"),
        (np.array([[0.5], [-0.1]]), "attention", {}, "negative or infinite mass"),
        (np.zeros((3, 2)), "removal", {"threshold": 0.0}, "threshold is 0.0"),
        (np.zeros((3, 2)), "removal", {"threshold": 1.5}, "threshold is 1.5"),
    ],
)
def test_errors(values: np.ndarray, kind: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fusion_depth(values, kind, **options)
