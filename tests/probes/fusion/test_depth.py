from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.fusion.depth import agreement, fusion_depth

LAYERS = 6


def step_curve(depth: int, samples: int = 40) -> np.ndarray:
    """Scores of 1 with vision in the first `depth` layers or more, and of 0 with fewer."""
    return np.repeat((np.arange(LAYERS + 1) >= depth).astype(float)[:, None], samples, axis=1)


@pytest.mark.parametrize("depth", range(1, LAYERS + 1))
def test_fusion_depth_of_removal_step_is_step(depth: int) -> None:
    result = fusion_depth(step_curve(depth), "removal")
    assert (result.depth, result.low, result.high) == (depth, depth, depth)
    assert (result.layers, result.samples) == (LAYERS, 40)
    assert result.curve == tuple(float(k >= depth) for k in range(LAYERS + 1))


@pytest.mark.parametrize("depth", range(1, LAYERS + 1))
def test_fusion_depth_of_even_attention_is_last_attending_layer(depth: int) -> None:
    """The first `depth` layers share the mass evenly, so threshold 1 needs all of them."""
    mass = np.repeat((np.arange(LAYERS) < depth).astype(float)[:, None], 10, axis=1) / depth
    assert fusion_depth(mass, "attention", threshold=1.0).depth == depth


@pytest.mark.parametrize(("threshold", "depth"), [(0.5, 1), (0.51, 2), (0.75, 2), (0.9, 4), (0.9375, 4), (0.95, 5)])
def test_fusion_depth_of_geometric_attention_equals_closed_form(threshold: float, depth: int) -> None:
    """Layer l has mass 2^-(l+1), so the first k layers have 1 - 2^-k of a total of nearly 1."""
    mass = np.repeat(0.5 ** np.arange(1, 41)[:, None], 3, axis=1)
    assert fusion_depth(mass, "attention", threshold=threshold).depth == depth


def test_fusion_depth_at_threshold_ignores_rounding() -> None:
    mass = np.array([[0.01], [0.12], [0.13 / 9]]).repeat(2, axis=1)
    assert (0.01 + 0.12) / mass[:, 0].sum() < 0.9, "floating point makes 0.9 smaller"
    assert fusion_depth(mass, "attention", threshold=0.9).depth == 2


def test_fusion_depth_with_later_dip_is_after_dip() -> None:
    curve = np.array([0.0, 1.0, 0.5, 1.0, 1.0])[:, None].repeat(20, axis=1)
    assert fusion_depth(curve, "removal").depth == 3


def test_fusion_depth_of_removal_measures_from_score_without_image() -> None:
    """Scores rise from 0.5 (chance) to 0.9. At 0.85 the share is 0.875, below the threshold; at 0.87 it is 0.925."""
    curve = np.array([0.5, 0.5, 0.85, 0.87, 0.9])[:, None].repeat(20, axis=1)
    assert fusion_depth(curve, "removal").depth == 3
    assert fusion_depth(curve, "removal", threshold=0.875).depth == 2


@pytest.mark.parametrize("seed", range(3))
def test_fusion_depth_of_text_only_control_is_none(seed: int) -> None:
    """Constant scores and pure noise do not depend on the image."""
    noise = np.random.default_rng(seed).integers(0, 2, size=(LAYERS + 1, 300))
    for control in (np.ones((LAYERS + 1, 300)), noise):
        result = fusion_depth(control, "removal")
        assert (result.depth, result.low, result.high) == (None, None, None)
        assert str(result) == "none of 6 layers (n=300, removal)"


def test_fusion_depth_without_attention_is_none() -> None:
    for mass, samples in ((np.zeros((LAYERS, 5)), 5), (np.full((LAYERS, 5), np.nan), 0)):
        result = fusion_depth(mass, "attention")
        assert (result.depth, result.samples) == (None, samples)


def test_fusion_depth_of_attention_leaves_out_samples_without_image() -> None:
    mass = np.array([[0.8, np.nan, 0.8], [0.1, np.nan, 0.1], [0.1, np.nan, 0.1]])
    result = fusion_depth(mass, "attention", threshold=0.8)
    assert (result.depth, result.samples) == (1, 2)
    assert result.curve == pytest.approx((0.8, 0.1, 0.1))


def noisy_curve(samples: int, seed: int) -> np.ndarray:
    """Bernoulli scores whose rate rises linearly with k, so that neighbouring points are hard to distinguish."""
    rate = np.linspace(0.3, 0.9, LAYERS * 4 + 1)[:, None]
    return (np.random.default_rng(seed).random((LAYERS * 4 + 1, samples)) < rate).astype(float)


def test_fusion_depth_with_fewer_noisy_samples_has_wider_interval() -> None:
    few, many = (
        fusion_depth(noisy_curve(60, 0), "removal"),
        fusion_depth(noisy_curve(20_000, 0), "removal", resamples=200),
    )
    assert many.depth == 22  # r(k) = k / 24 reaches 0.9 at 21.6
    assert many.high - many.low <= 1 < few.high - few.low
    assert few.low <= few.depth <= few.high


def test_fusion_depth_of_noisy_removal_interval_covers_true_depth() -> None:
    """The interval covers it in 95% of experiments: in 50 or more of 60 with binomial probability above 0.999."""
    results = [fusion_depth(noisy_curve(400, seed), "removal", resamples=300) for seed in range(60)]
    assert sum(r.low <= 22 <= r.high for r in results) >= 50


def test_fusion_depth_in_small_chunks_is_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator draws row by row, so chunks continue the same random stream."""
    one_chunk = fusion_depth(noisy_curve(50, 1), "removal")
    monkeypatch.setattr("probes.fusion.bootstrap.DRAW_COUNTS_PER_CHUNK", 50 * 7)
    assert fusion_depth(noisy_curve(50, 1), "removal") == one_chunk


def test_fusion_depth_with_same_seed_is_equal_and_serializable() -> None:
    scores = noisy_curve(50, 2)
    first = fusion_depth(scores, "removal", seed=3)
    assert fusion_depth(scores, "removal", seed=3) == first
    assert json.loads(json.dumps(dataclasses.asdict(first)))["depth"] == first.depth
    assert str(fusion_depth(step_curve(3, 1200), "removal")) == "3 of 6 layers (95% CI 3 to 3, n=1200, removal)"


def knockout_scores(own_damage: list[float], width: int, samples: int = 20) -> np.ndarray:
    """Knock-out scores of a model in which the damage of a window is the sum of its layers' `own_damage`."""
    layers = len(own_damage)
    windows = [own_damage[max(last - width + 1, 0) : last + 1] for last in range(layers + width - 1)]
    return np.array([0.0, *(-sum(window) for window in windows)])[:, None].repeat(samples, axis=1)


@pytest.mark.parametrize("width", [1, 2, 3, 9])
@pytest.mark.parametrize("depth", range(1, LAYERS + 1))
def test_fusion_depth_of_knockout_is_damaged_layer(depth: int, width: int) -> None:
    result = fusion_depth(
        knockout_scores([float(layer == depth) for layer in range(1, LAYERS + 1)], width), "knockout", width=width
    )
    assert (result.depth, result.low, result.high, result.layers) == (depth, depth, depth, LAYERS)
    assert result.reads == (depth,)


@pytest.mark.parametrize("width", [1, 2, 3])
@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=9).filter(any))
def test_fusion_depth_of_additive_knockout_names_damaged_layers(width: int, own_damage: list[float]) -> None:
    """Damaged layers may be less than a window apart, with an undamaged layer between them."""
    result = fusion_depth(knockout_scores(own_damage, width), "knockout", width=width, resamples=20)
    assert result.reads == tuple(layer for layer, damage in enumerate(own_damage, 1) if damage)
    last = max(result.reads)
    assert last - width + 1 <= result.depth <= last


@pytest.mark.parametrize("width", [2, 3])
def test_fusion_depth_of_redundant_layers_is_first_and_names_neither(width: int) -> None:
    """Layers 3 and 4 read the same content, so only a window over both does damage. Fusion is complete by layer 3."""
    damaged = [3 in w and 4 in w for w in (range(e - width + 2, e + 2) for e in range(LAYERS + width - 1))]
    scores = np.array([0.0, *(-float(x) for x in damaged)])[:, None].repeat(9, axis=1)
    result = fusion_depth(scores, "knockout", width=width)
    assert (result.depth, result.reads) == (3, ())
    assert fusion_depth(knockout_scores([0.0] * LAYERS, 1), "knockout", width=1).depth is None, (
        "windows of 1 layer do no damage"
    )


@pytest.mark.parametrize("depth", range(1, LAYERS + 1))
def test_fusion_depth_of_fading_readout_is_step(depth: int) -> None:
    curve = step_curve(depth)
    curve[depth + 2 :] = 0  # the content fades again
    result = fusion_depth(curve, "readout")
    assert (result.depth, result.low, result.high, result.reads) == (depth, depth, depth, (depth,))


def test_fusion_depth_of_readout_measures_from_embeddings() -> None:
    """Accuracy rises from 0.5 without the image to 0.9. At 0.8 the share is 0.75, at 0.87 it is 0.925."""
    exact = (np.arange(100)[None] < np.array([50, 50, 80, 87, 90])[:, None]).astype(float)
    assert fusion_depth(exact, "readout").depth == 3
    assert fusion_depth(exact, "readout", threshold=0.75).depth == 2


@pytest.mark.parametrize(("kind", "points"), [("readout", 33), ("removal", 33), ("knockout", 33)])
def test_fusion_depth_of_noise_is_none(kind: str, points: int) -> None:
    """Noise has a best and a worst layer too. At the level of the interval, 1 in 20 of these may have a depth."""
    rng = np.random.default_rng(0)
    false_depths = 0
    width = 1 if kind == "knockout" else None
    for _ in range(60):
        scores = (rng.random((points, 80)) < 0.25).astype(float)
        false_depths += fusion_depth(scores, kind, width=width, resamples=300).depth is not None
    assert false_depths <= 6  # more with binomial probability 0.03


def test_fusion_depth_of_weak_readout_is_found() -> None:
    """Accuracy is 0.25, and 0.5 from layer 10 on; 100 samples."""
    accuracy = np.where(np.arange(33) < 10, 0.25, 0.5)[:, None]
    rng = np.random.default_rng(0)
    results = [
        fusion_depth((rng.random((33, 100)) < accuracy).astype(float), "readout", resamples=300) for _ in range(20)
    ]
    assert sum(r.depth is not None for r in results) >= 15
    assert all(r.depth >= 10 for r in results if r.depth is not None)


@pytest.mark.parametrize("kind", ["attention", "knockout"])
def test_fusion_depth_of_noisy_curve_interval_covers_true_depth(kind: str) -> None:
    """Layers contribute less and less, and samples scatter; r is known in closed form."""
    own = np.array([0.5, 0.25, 0.1, 0.04, 0.06, 0.05])  # 0.89 after 4 layers
    true_depth = 5
    covered = 0
    for seed in range(60):
        noise = np.random.default_rng(seed).gamma(2.0, own[:, None] / 2, size=(6, 100))
        values = noise if kind == "attention" else np.concatenate([np.zeros((1, 100)), -noise])
        result = fusion_depth(values, kind, width=1 if kind == "knockout" else None, resamples=300)
        covered += result.low <= true_depth <= result.high
    assert covered >= 50


def test_fusion_depth_of_attention_below_floor_is_none() -> None:
    """Attention is positive everywhere: there is nothing to locate if it is below 0.1% in every layer."""
    shape = np.array([0.2, 1.0, 0.1])[:, None].repeat(30, axis=1)
    assert fusion_depth(0.99e-3 * shape, "attention").depth is None
    assert fusion_depth(1.01e-3 * shape, "attention").depth == 2
    # One attending sample of 30 is not enough.
    shape[:, 1:] = 0
    assert fusion_depth(shape, "attention").depth is None


def test_fusion_depth_of_two_reading_layers_names_both() -> None:
    two = np.array([0.0, 0.0, 0.5, 0.5, 0.5, 1.0, 1.0])[:, None].repeat(12, axis=1)
    for kind, values in (("removal", two), ("readout", two), ("attention", np.diff(two, axis=0))):
        result = fusion_depth(values, kind)
        assert (result.depth, result.reads) == (5, (2, 5))
        assert str(result) == f"5 of 6 layers (95% CI 5 to 5, n=12, {kind}), read at layers 2 and 5"


def test_fusion_depth_reads_leaves_out_small_and_uncertain_shares() -> None:
    mass = np.array([0.85, 0.1, 0.05])[:, None].repeat(12, axis=1)
    result = fusion_depth(mass, "attention")
    assert (result.depth, result.reads) == (2, (1,))
    assert str(result).endswith("attention), read at layer 1")
    mass[1, :2] = [0.0, 0.3]  # 0.108 on average, due to one sample
    assert fusion_depth(mass, "attention").reads == (1,)


def test_agreement_of_estimates_reports_spread_and_incompatible_pairs() -> None:
    at = {depth: fusion_depth(step_curve(depth), "removal") for depth in (2, 5)}
    attention = fusion_depth(np.diff(step_curve(2), axis=0), "attention")
    none = fusion_depth(np.zeros((LAYERS + 1, 4)), "knockout", width=1)

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


def test_agreement_of_incomparable_estimates_raises_value_error() -> None:
    removal = fusion_depth(step_curve(2), "removal")
    other = fusion_depth(np.ones((9, 4)), "attention")
    for depths in ([], [removal], [removal, removal], [removal, other]):
        with pytest.raises(ValueError, match="cannot compare"):
            agreement(depths)


@pytest.mark.parametrize(
    ("values", "kind", "options", "message"),
    [
        (
            np.zeros((3, 2)),
            "gaze",
            {},
            r"kind is 'gaze'.*'attention', 'removal', 'knockout', 'readout'",
        ),
        (np.zeros((3, 2)), "knockout", {"width": 3}, r"knockout needs \[layers \+ 3, samples\]"),
        (np.zeros((3, 2)), "knockout", {"width": 0}, "width is 0"),
        (np.zeros((3, 2)), "knockout", {"width": 1.0}, "width is 1.0"),
        (np.zeros((3, 2)), "removal", {"level": 95}, "level is 95"),
        (np.zeros((3, 2)), "removal", {"resamples": 0}, "resamples is 0"),
        (np.zeros((3, 2)), "removal", {"width": 2}, r"width is 2.*removal"),
        (np.zeros((1, 2)), "readout", {}, r"readout needs \[layers \+ 1, samples\]"),
        (np.zeros(3), "removal", {}, r"shape \[3\].*removal needs \[layers \+ 1, samples\]"),
        (np.zeros((1, 4)), "removal", {}, r"removal needs \[layers \+ 1, samples\]"),
        (np.zeros((3, 0)), "attention", {}, r"attention needs \[layers, samples\]"),
        (np.array([[0.0, np.nan], [1.0, np.nan]]), "attention", {}, "single sample"),
        (np.array([[0.0], [np.nan]]), "removal", {}, "score that is not finite"),
        (np.array([[0.5], [np.nan]]), "attention", {}, r"sample 0 has NaN mass in layers \[1\] .*sliding"),
        (np.array([[0.5], [-0.1]]), "attention", {}, "negative or infinite mass"),
        (np.zeros((3, 2)), "removal", {"threshold": 0.0}, "threshold is 0.0"),
        (np.zeros((3, 2)), "removal", {"threshold": 1.5}, "threshold is 1.5"),
    ],
)
def test_fusion_depth_with_invalid_arguments_raises_value_error(
    values: np.ndarray, kind: str, options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fusion_depth(values, kind, **options)
