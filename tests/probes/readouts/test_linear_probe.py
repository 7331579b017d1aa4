from __future__ import annotations

import numpy as np
import pytest
import torch

from probes.readouts.linear_probe import PENALTIES, _dealt, _ridge, linear_readout


def clouds(samples: int = 120, width: int = 5, distance: float = 8.0, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    """Three labels: in layer 1 each is a cloud of its own, in layer 0 all are one."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(2, samples, width, generator=generator)
    label = torch.arange(samples) % 3
    states[1, torch.arange(samples), label] += distance
    return states, [["cat", "dog", "owl"][i] for i in label.tolist()]


def test_clouds_are_told_apart_and_noise_is_not() -> None:
    found = linear_readout(*clouds())
    assert found.correct.shape == found.control.shape == (2, 120)
    assert found.accuracy[1] == 1
    assert abs(found.accuracy[0] - 1 / 3) < 0.13  # 3 standard errors
    assert (abs(found.control.mean(axis=1) - 1 / 3) < 0.13).all()
    assert found.selectivity == pytest.approx(found.accuracy - found.control.mean(axis=1))
    assert found.selectivity[1] > 0.5


def by_hand(states: torch.Tensor, classes: torch.Tensor, train: list[int], test: int) -> torch.Tensor:
    """Primal ridge regression with an intercept, the penalty chosen by training once for each sample left out."""
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

    # The mean eigenvalue: the trace of the weighted rows' Gram matrix over their number.
    centred = x[train] - weight[train] @ x[train]
    unit = float((weight[train] * centred.square().sum(1)).sum()) / len(train)
    errors = [
        sum(weight[row] * (fit([r for r in train if r != row], unit * p, row) - y[row]).square().sum() for row in train)
        for p in PENALTIES
    ]
    return fit(train, unit * PENALTIES[int(np.argmin(errors))], test)


@pytest.mark.parametrize("distance", [0.0, 0.7, 3.0])
def test_outputs_are_those_of_ridge_regression_by_hand(distance: float) -> None:
    """Labels of unequal number, and features whose means are not 0; different penalties win."""
    states, _ = clouds(samples=24, width=4, distance=distance)
    classes = (torch.arange(24) % 7).clamp(max=2)
    states = states[1] + torch.tensor([5.0, 0, 0, -1]) + classes[:, None] * distance
    train, test = list(range(20)), list(range(20, 24))
    targets = torch.nn.functional.one_hot(torch.stack([classes, classes.flip(0)])).double()
    found = _ridge(states[train].double(), targets[:, train], states[test].double())
    for outputs, labels in zip(found, (classes, classes.flip(0)), strict=True):
        expected = torch.stack([by_hand(states, labels, train, row) for row in test])
        assert outputs == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(2))
def test_equals_ridge_regression_by_hand(seed: int) -> None:
    """Folds of one sample each, so that the split is known; clouds near enough for mistakes."""
    states, labels = clouds(samples=18, width=4, distance=1.5, seed=seed)
    found = linear_readout(states, labels, folds=18)
    classes = torch.tensor([["cat", "dog", "owl"].index(label) for label in labels])
    for layer in range(2):
        expected = [
            int(by_hand(states[layer], classes, [r for r in range(18) if r != test], test).argmax()) == classes[test]
            for test in range(18)
        ]
        assert found.correct[layer].tolist() == expected
    assert 0 < found.correct.mean() < 1


def test_rare_labels_count_as_much() -> None:
    """One in ten is a cat, three deviations away: told by a threshold in the middle, wrong in 7%."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(400) % 10 == 0
    states = torch.randn(2, 400, 3, generator=generator)
    states[1, :, 0] += 3.0 * label
    found = linear_readout(states, label)
    assert found.correct[1, label].mean() > 0.8
    assert found.correct[1, ~label].mean() > 0.85
    assert abs(found.accuracy[0] - 0.5) < 0.1


def test_chance_is_one_in_the_number_of_labels() -> None:
    """Few samples in many folds, which a classifier that counts labels pays for: it names what the fold lacks."""
    states = torch.randn(40, 33, 4, generator=torch.Generator().manual_seed(0))
    found = linear_readout(states, torch.arange(33) % 3)
    assert found.correct.mean() == pytest.approx(1 / 3, abs=0.04)
    assert found.control.mean() == pytest.approx(1 / 3, abs=0.04)


def test_wider_states_than_samples_and_constant_features() -> None:
    states, labels = clouds(samples=30)
    wide = torch.cat([states, torch.full((2, 30, 100), 7.3), torch.zeros(2, 30, 3)], -1)
    assert (linear_readout(wide, labels).correct == linear_readout(states, labels).correct).all()


def test_features_of_any_scale_count_alike() -> None:
    states, labels = clouds(distance=2.0)
    scaled = states * torch.tensor([1e-6, 1e6, 1.0, 1e3, 1e-3]) + 3.0 * torch.tensor([0, 1e6, 0, 1, 1])
    assert (linear_readout(scaled, labels).correct == linear_readout(states, labels).correct).mean() > 0.99


def test_a_picture_is_in_one_fold() -> None:
    """Each picture has a place and a random label of its own: known by heart, it is told; unseen, it is not."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.arange(160) % 40
    labels = torch.randint(2, (40,), generator=generator)[pictures]
    place = torch.randn(40, 64, generator=generator)[pictures]
    states = (place + 0.01 * torch.randn(160, 64, generator=generator))[None]
    assert linear_readout(states, labels).accuracy[0] > 0.95
    assert linear_readout(states, labels, pictures=pictures).accuracy[0] < 0.75


def test_folds_hold_their_share_of_every_label() -> None:
    """Labels 0 and 1 in halves: in folds dealt at random, chance is hit less evenly than in these."""
    classes = np.arange(50) % 2
    fold = _dealt(classes, np.arange(50), 5, np.random.default_rng(0))
    assert [[int(((fold == f) & (classes == c)).sum()) for c in (0, 1)] for f in range(5)] == [[5, 5]] * 5


def test_same_input_same_output_and_label_names_do_not_matter() -> None:
    states, labels = clouds(distance=1.0)
    first, again = linear_readout(states, labels, seed=3), linear_readout(states, labels, seed=3)
    assert (first.correct == again.correct).all()
    assert (first.control == again.control).all()
    numbers = torch.tensor([["cat", "dog", "owl"].index(label) for label in labels])
    assert (linear_readout(states, numbers, seed=3).correct == first.correct).all()
    assert (linear_readout(states.bfloat16().float(), numbers, seed=4).control != first.control).any()


@pytest.mark.parametrize(
    ("states", "labels", "options", "message"),
    [
        (torch.zeros(4, 3), [0, 1, 0, 1], {}, r"states have shape \[4, 3\] for 4 labels: \[layers, samples, width\]"),
        (torch.zeros(1, 4, 3), [0, 1], {}, "for 2 labels"),
        (torch.zeros(1, 4, 3), [0, 1, 0, 1], {"pictures": [1]}, "for 4 labels and 1 pictures"),
        (torch.zeros(1, 4, 3), [2, 2, 2, 2], {}, "fewer than 2 different labels"),
        (torch.zeros(1, 4, 3), [0, 1, 0, 1], {}, "folds is 5: it must be at least 2 and at most the 4 pictures"),
        (torch.zeros(1, 4, 3), [0, 1, 0, 1], {"pictures": [0, 0, 1, 1], "folds": 3}, "at most the 2 pictures"),
        (torch.zeros(1, 4, 3), [0, 1, 0, 1], {"folds": 1}, "folds is 1"),
        (torch.tensor([[[0.0], [1.0], [np.nan], [0.0]]]), [0, 1, 0, 1], {}, "sample 2 are not finite"),
    ],
)
def test_errors(states: torch.Tensor, labels: list[int], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_readout(states, labels, **options)
