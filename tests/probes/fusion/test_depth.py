from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.fusion.depth import agreement, fusion_depth

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
    monkeypatch.setattr("probes.fusion.depth.WEIGHTS_PER_CHUNK", 50 * 7)
    assert fusion_depth(noisy(50, 1), "removal") == whole


def test_seeded_and_plain() -> None:
    scores = noisy(50, 2)
    first = fusion_depth(scores, "removal", seed=3)
    assert fusion_depth(scores, "removal", seed=3) == first
    assert json.loads(json.dumps(dataclasses.asdict(first)))["depth"] == first.depth
    assert str(fusion_depth(step(3, 1200), "removal")) == "3 of 6 layers (95% CI 3 to 3, n=1200, removal)"


def knocked(own: list[float], width: int, samples: int = 20) -> np.ndarray:
    """Scores with windows knocked out of a model whose layers add up: `own` is lost with each."""
    layers = len(own)
    windows = [own[max(last - width + 1, 0) : last + 1] for last in range(layers + width - 1)]
    return np.array([0.0, *(-sum(window) for window in windows)])[:, None].repeat(samples, axis=1)


@pytest.mark.parametrize("width", [1, 2, 3, 9])
@pytest.mark.parametrize("depth", range(1, LAYERS + 1))
def test_knockout_finds_every_layer(depth: int, width: int) -> None:
    found = fusion_depth(
        knocked([float(layer == depth) for layer in range(1, LAYERS + 1)], width), "knockout", width=width
    )
    assert (found.depth, found.low, found.high, found.layers) == (depth, depth, depth, LAYERS)
    assert found.reads == (depth,)


@pytest.mark.parametrize("width", [1, 2, 3])
@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=9).filter(any))
def test_knockout_tells_layers_that_add_up_apart(width: int, own: list[float]) -> None:
    """Also where layers that matter are less than a window apart, and the one between them does not."""
    found = fusion_depth(knocked(own, width), "knockout", width=width, resamples=20)
    assert found.reads == tuple(layer for layer, damage in enumerate(own, 1) if damage)
    last = max(found.reads)
    assert last - width + 1 <= found.depth <= last


@pytest.mark.parametrize("width", [2, 3])
def test_knockout_of_what_two_layers_both_hold(width: int) -> None:
    """Layers 3 and 4 read the same: only a window over both hurts. By layer 3 vision has been fused."""
    lost = [3 in w and 4 in w for w in (range(e - width + 2, e + 2) for e in range(LAYERS + width - 1))]
    scores = np.array([0.0, *(-float(x) for x in lost)])[:, None].repeat(9, axis=1)
    found = fusion_depth(scores, "knockout", width=width)
    assert (found.depth, found.reads) == (3, ())
    assert fusion_depth(knocked([0.0] * LAYERS, 1), "knockout").depth is None, "as windows of 1 see it"


@pytest.mark.parametrize("depth", range(1, LAYERS + 1))
def test_readout_finds_every_step_though_it_fades(depth: int) -> None:
    steps = step(depth)
    steps[depth + 2 :] = 0  # what was there is forgotten again
    found = fusion_depth(steps, "readout")
    assert (found.depth, found.low, found.high, found.reads) == (depth, depth, depth, (depth,))


def test_readout_starts_from_what_the_text_says_anyway() -> None:
    """From 0.5 without the picture to 0.9: at 0.8 the share is 0.75, at 0.87 it is 0.925."""
    exact = (np.arange(100)[None] < np.array([50, 50, 80, 87, 90])[:, None]).astype(float)
    assert fusion_depth(exact, "readout").depth == 3
    assert fusion_depth(exact, "readout", threshold=0.75).depth == 2


@pytest.mark.parametrize(("kind", "points"), [("readout", 33), ("removal", 33), ("knockout", 33)])
def test_chance_is_no_fusion(kind: str, points: int) -> None:
    """Noise has a best layer and a worst one, too. By their level, at most 1 in 20 of these may be taken in."""
    rng = np.random.default_rng(0)
    taken_in = 0
    for _ in range(60):
        scores = (rng.random((points, 80)) < 0.25).astype(float)
        taken_in += fusion_depth(scores, kind, resamples=300).depth is not None
    assert taken_in <= 6  # binomially, more with probability 0.03


def test_weak_readouts_are_found() -> None:
    """Right in 0.25 of samples, from layer 10 on in 0.5; 100 samples."""
    rate = np.where(np.arange(33) < 10, 0.25, 0.5)[:, None]
    rng = np.random.default_rng(0)
    found = [fusion_depth((rng.random((33, 100)) < rate).astype(float), "readout", resamples=300) for _ in range(20)]
    assert sum(f.depth is not None for f in found) >= 15
    assert all(f.depth >= 10 for f in found if f.depth is not None)


@pytest.mark.parametrize("kind", ["attention", "knockout"])
def test_intervals_cover_the_truth(kind: str) -> None:
    """As for removal: layers matter less and less, samples scatter; r is known in closed form."""
    own = np.array([0.5, 0.25, 0.1, 0.04, 0.06, 0.05])  # 0.89 after 4 layers
    truth = 5
    covered = 0
    for seed in range(60):
        noise = np.random.default_rng(seed).gamma(2.0, own[:, None] / 2, size=(6, 100))
        values = noise if kind == "attention" else np.concatenate([np.zeros((1, 100)), -noise])
        found = fusion_depth(values, kind, resamples=300)
        covered += found.low <= truth <= found.high
    assert covered >= 50


def test_a_glance_is_no_look() -> None:
    """Attention is positive everywhere: below 0.1% of it in every layer, there is nothing to locate."""
    shape = np.array([0.2, 1.0, 0.1])[:, None].repeat(30, axis=1)
    assert fusion_depth(0.99e-3 * shape, "attention").depth is None
    assert fusion_depth(1.01e-3 * shape, "attention").depth == 2
    # One sample of 30 that looks is not enough.
    shape[:, 1:] = 0
    assert fusion_depth(shape, "attention").depth is None


def test_two_layers_are_said_to_be_two() -> None:
    two = np.array([0.0, 0.0, 0.5, 0.5, 0.5, 1.0, 1.0])[:, None].repeat(12, axis=1)
    for kind, values in (("removal", two), ("readout", two), ("attention", np.diff(two, axis=0))):
        found = fusion_depth(values, kind)
        assert (found.depth, found.reads) == (5, (2, 5))
        assert str(found) == f"5 of 6 layers (95% CI 5 to 5, n=12, {kind}), read at layers 2 and 5"


def test_layers_with_a_small_or_an_unsure_share_are_not_named() -> None:
    mass = np.array([0.85, 0.1, 0.05])[:, None].repeat(12, axis=1)
    found = fusion_depth(mass, "attention")
    assert (found.depth, found.reads) == (2, (1,))
    assert str(found).endswith("attention), read at layer 1")
    mass[1, :2] = [0.0, 0.3]  # 0.108 on average, carried by one sample
    assert fusion_depth(mass, "attention").reads == (1,)


def test_agreement() -> None:
    at = {depth: fusion_depth(step(depth), "removal") for depth in (2, 5)}
    attention = fusion_depth(np.diff(step(2), axis=0), "attention")
    none = fusion_depth(np.zeros((LAYERS + 1, 4)), "knockout")

    same = agreement([at[2], attention])
    assert (same.spread, same.apart) == (0, ())
    assert str(same) == "removal 2 (2 to 2), attention 2 (2 to 2): 0 layers apart at most, all intervals overlap"
    three = agreement([at[5], attention, dataclasses.replace(none, layers=LAYERS)])
    assert three.spread == 3
    assert three.apart == (("removal", "attention"), ("removal", "knockout"), ("attention", "knockout"))
    assert str(three).endswith(
        "3 layers apart at most, not compatible: removal and attention; removal and knockout; attention and knockout"
    )
    wide = dataclasses.replace(attention, low=1, high=5)
    assert agreement([at[5], wide]).apart == ()
    lower = dataclasses.replace(attention, low=1, high=4)
    for pair in ([at[5], lower], [lower, at[5]]):
        assert agreement(pair).apart == ((pair[0].kind, pair[1].kind),)
    nothing = agreement([none, fusion_depth(np.zeros((LAYERS, 4)), "attention")])
    assert (nothing.spread, nothing.apart) == (None, ())
    assert str(nothing) == "knockout none, attention none: no curve locates a fusion"


def test_agreement_of_what_cannot_be_compared() -> None:
    removal = fusion_depth(step(2), "removal")
    other = fusion_depth(np.ones((9, 4)), "attention")
    for depths in ([], [removal], [removal, removal], [removal, other]):
        with pytest.raises(ValueError, match="give estimates of different kinds for one model"):
            agreement(depths)


@pytest.mark.parametrize(
    ("values", "kind", "options", "message"),
    [
        (
            np.zeros((3, 2)),
            "gaze",
            {},
            "kind is 'gaze': it must be one of 'attention', 'removal', 'knockout', 'readout'",
        ),
        (np.zeros((3, 2)), "knockout", {"width": 3}, r"knockout needs \[layers \+ 3, samples\]"),
        (np.zeros((3, 2)), "knockout", {"width": 0}, "width is 0: windows hold at least 1 layer"),
        (np.zeros((3, 2)), "removal", {"width": 2}, "width is 2: removal has none"),
        (np.zeros((1, 2)), "readout", {}, r"readout needs \[layers \+ 1, samples\]"),
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
