"""`linear_readout` against primal ridge regression, on separable, rare and random labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probes.readouts.linear_probe import RIDGE_PENALTIES, _assign_folds, _ridge_outputs, linear_readout


def make_clusters(
    samples: int = 120, width: int = 5, distance: float = 8.0, seed: int = 0
) -> tuple[torch.Tensor, list[str]]:
    """Return states and three labels: in layer 1 each label is a cluster of its own, in layer 0 all are one cluster."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(2, samples, width, generator=generator)
    label = torch.arange(samples) % 3
    states[1, torch.arange(samples), label] += distance
    return states, [["cat", "dog", "owl"][i] for i in label.tolist()]


def test_linear_readout_separates_clusters_and_not_noise() -> None:
    readout = linear_readout(*make_clusters())
    assert readout.correct.shape == readout.control.shape == (2, 120)
    assert readout.accuracy[1] == 1
    assert abs(readout.accuracy[0] - 1 / 3) < 0.13  # 3 standard errors
    assert (abs(readout.control.mean(axis=1) - 1 / 3) < 0.13).all()
    assert readout.selectivity == pytest.approx(readout.accuracy - readout.control.mean(axis=1))
    assert readout.selectivity[1] > 0.5


def reference_outputs(states: torch.Tensor, classes: torch.Tensor, train: list[int], test: int) -> torch.Tensor:
    """Return the outputs of primal ridge regression with an intercept.

    The penalty is chosen by one training for each sample left out.
    """
    x, y = states.double(), torch.nn.functional.one_hot(classes).double()
    x = (x - x[train].mean(0)) / x[train].std(0, unbiased=False)
    weight = 1 / classes[train].bincount()[classes].double()
    weight /= weight[train].sum()

    def fit(rows: list[int], penalty: float, row: int) -> torch.Tensor:
        # The intercept is a feature that is not penalised.
        design = torch.cat([x[rows], torch.ones(len(rows), 1, dtype=x.dtype)], 1)
        ridge = penalty * torch.eye(design.shape[1], dtype=x.dtype)
        ridge[-1, -1] = 0
        weighted = design.T * weight[rows]
        weights = torch.linalg.solve(weighted @ design + ridge, weighted @ y[rows])
        return torch.cat([x[row], torch.ones(1, dtype=x.dtype)]) @ weights

    # The mean eigenvalue: the trace of the weighted rows' Gram matrix, divided by their number.
    centred = x[train] - weight[train] @ x[train]
    unit = float((weight[train] * centred.square().sum(1)).sum()) / len(train)
    errors = [
        sum(weight[row] * (fit([r for r in train if r != row], unit * p, row) - y[row]).square().sum() for row in train)
        for p in RIDGE_PENALTIES
    ]
    return fit(train, unit * RIDGE_PENALTIES[int(np.argmin(errors))], test)


@pytest.mark.parametrize("width", [4, 30])
@pytest.mark.parametrize("distance", [0.0, 0.7, 3.0])
def test_ridge_outputs_equal_primal_ridge_regression(distance: float, width: int) -> None:
    """Labels of unequal frequency, and features with a mean other than 0; different penalties win.

    With 30 features there are more features than the 20 training samples.
    """
    states, _ = make_clusters(samples=24, width=width, distance=distance)
    classes = (torch.arange(24) % 7).clamp(max=2)
    states = states[1] + torch.linspace(5.0, -1, width) + classes[:, None] * distance
    train, test = list(range(20)), list(range(20, 24))
    targets = torch.nn.functional.one_hot(torch.stack([classes, classes.flip(0)])).double()
    outputs_of_sets = _ridge_outputs(states[train].double(), targets[:, train], states[test].double())
    for outputs, labels in zip(outputs_of_sets, (classes, classes.flip(0)), strict=True):
        expected = torch.stack([reference_outputs(states, labels, train, row) for row in test])
        assert outputs == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(2))
def test_linear_readout_equals_primal_ridge_regression(seed: int) -> None:
    """Folds of one sample each, so that the split is known; clusters close enough for errors."""
    states, labels = make_clusters(samples=18, width=4, distance=1.5, seed=seed)
    readout = linear_readout(states, labels, folds=18)
    classes = torch.tensor([["cat", "dog", "owl"].index(label) for label in labels])
    for layer in range(2):
        expected = [
            int(reference_outputs(states[layer], classes, [r for r in range(18) if r != test], test).argmax())
            == classes[test]
            for test in range(18)
        ]
        assert readout.correct[layer].tolist() == expected
    assert 0 < readout.correct.mean() < 1


def test_linear_readout_rare_labels_have_equal_weight() -> None:
    """One label in ten is positive, three standard deviations away: a threshold in the middle is wrong in 7%."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(400) % 10 == 0
    states = torch.randn(2, 400, 3, generator=generator)
    states[1, :, 0] += 3.0 * label
    readout = linear_readout(states, label)
    assert readout.correct[1, label].mean() > 0.8
    assert readout.correct[1, ~label].mean() > 0.85
    assert abs(readout.accuracy[0] - 0.5) < 0.1


def test_linear_readout_random_states_score_one_over_number_of_labels() -> None:
    """Few samples in many folds. A classifier by label frequency would score less: it predicts what the fold lacks."""
    states = torch.randn(40, 33, 4, generator=torch.Generator().manual_seed(0))
    readout = linear_readout(states, torch.arange(33) % 3)
    assert readout.correct.mean() == pytest.approx(1 / 3, abs=0.04)
    assert readout.control.mean() == pytest.approx(1 / 3, abs=0.04)


def test_linear_readout_constant_features_change_nothing() -> None:
    states, labels = make_clusters(samples=30)
    wide = torch.cat([states, torch.full((2, 30, 100), 7.3), torch.zeros(2, 30, 3)], -1)
    assert (linear_readout(wide, labels).correct == linear_readout(states, labels).correct).all()


def test_linear_readout_feature_scale_does_not_matter() -> None:
    states, labels = make_clusters(distance=2.0)
    scaled = states * torch.tensor([1e-6, 1e6, 1.0, 1e3, 1e-3]) + 3.0 * torch.tensor([0, 1e6, 0, 1, 1])
    assert (linear_readout(scaled, labels).correct == linear_readout(states, labels).correct).mean() > 0.99


def test_linear_readout_samples_of_one_image_are_in_one_fold() -> None:
    """Each image has states and a random label of its own: readable only if the image is in the training folds."""
    generator = torch.Generator().manual_seed(0)
    images = torch.arange(160) % 40
    labels = torch.randint(2, (40,), generator=generator)[images]
    image_states = torch.randn(40, 64, generator=generator)[images]
    states = (image_states + 0.01 * torch.randn(160, 64, generator=generator))[None]
    assert linear_readout(states, labels).accuracy[0] > 0.95
    assert linear_readout(states, labels, pictures=images).accuracy[0] < 0.75


def test_assign_folds_balances_labels() -> None:
    """Labels 0 and 1 in equal number: random folds would not be balanced."""
    classes = np.arange(50) % 2
    folds = _assign_folds(classes, np.arange(50), 5, np.random.default_rng(0))
    assert [[int(((folds == f) & (classes == c)).sum()) for c in (0, 1)] for f in range(5)] == [[5, 5]] * 5


def test_linear_readout_depends_on_seed_and_not_on_label_names() -> None:
    states, labels = make_clusters(distance=1.0)
    first, again = linear_readout(states, labels, seed=3), linear_readout(states, labels, seed=3)
    assert (first.correct == again.correct).all()
    assert (first.control == again.control).all()
    numbers = torch.tensor([["cat", "dog", "owl"].index(label) for label in labels])
    assert (linear_readout(states, numbers, seed=3).correct == first.correct).all()
    assert (linear_readout(states.bfloat16().float(), numbers, seed=4).control != first.control).any()


@pytest.mark.parametrize(
    ("states", "labels", "options", "message"),
    [
        (torch.zeros(4, 3), [0, 1, 0, 1], {}, r"states have shape \[4, 3\] for 4 labels.*\[layers, samples, width\]"),
        (torch.zeros(1, 4, 3), [0, 1], {}, "for 2 labels"),
        (torch.zeros(1, 4, 3), [0, 1, 0, 1], {"pictures": [1]}, "for 4 labels and 1 pictures"),
        (torch.zeros(1, 4, 3), [2, 2, 2, 2], {}, "fewer than 2 different labels"),
        (torch.zeros(1, 4, 3), [0, 1, 0, 1], {}, "folds is 5.*at most the 4 pictures"),
        (torch.zeros(1, 4, 3), [0, 1, 0, 1], {"pictures": [0, 0, 1, 1], "folds": 3}, "at most the 2 pictures"),
        (torch.zeros(1, 4, 3), [0, 1, 0, 1], {"folds": 1}, "folds is 1"),
        (torch.zeros(1, 4, 3), [0, 1, 0, 1], {"folds": 2.5}, "folds is 2.5"),
        (torch.tensor([[[0.0], [1.0], [np.nan], [0.0]]]), [0, 1, 0, 1], {}, "sample 2 are not finite"),
    ],
)
def test_linear_readout_invalid_argument_raises(
    states: torch.Tensor, labels: list[int], options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        linear_readout(states, labels, **options)
