"""What a linear classifier reads off hidden states, cross-validated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Ridge penalties that are tried, as multiples of the mean eigenvalue of the training states' Gram matrix.
PENALTIES = (1e-4, 1e-2, 1e0, 1e2, 1e4)


@dataclass(frozen=True, eq=False)
class Readout:
    """Which labels a linear read-out gets right on samples that it was not trained on.

    Attributes:
        correct: `[layers, samples]` of the labels asked for.
        control: `[layers, samples]` of the same labels shuffled over the samples: what the states' size alone allows.
    """

    correct: Bool[np.ndarray, "layers samples"]
    control: Bool[np.ndarray, "layers samples"]

    @property
    def accuracy(self) -> Float[np.ndarray, " layers"]:
        """Share of right labels, in 0 to 1."""
        return self.correct.mean(axis=1)

    @property
    def selectivity(self) -> Float[np.ndarray, " layers"]:
        """Accuracy above that of the shuffled labels (after Hewitt and Liang 2019, arXiv 1909.03368)."""
        return self.accuracy - self.control.mean(axis=1)


def linear_readout(
    states: Float[Tensor, "layers samples width"],
    labels: Sequence[Any],
    *,
    pictures: Sequence[Any] | None = None,
    folds: int = 5,
    seed: int = 0,
) -> Readout:
    """Trains a linear classifier for each layer and fold, and tests it on the samples of that fold.

    A ridge classifier in closed form: features standardised on the training samples, one target a label (1 for its
    samples, 0 for others), labels weighted alike however many samples they have, the largest output wins. So states
    that say nothing score 1 in the number of labels, not the share of the most frequent one. The penalty is the one of `PENALTIES` with the least squared error
    when each training sample is left out in turn, which needs no second training; the test samples have no part in it.
    Float64; the same input gives the same output.

    Folds are dealt out label by label, so each holds nearly the same share of every label.

    Args:
        states: Of one position or the mean over several, for example `probes.fusion.curves.text_states`.
        labels: `[samples]`, of any hashable kind: what to read.
        pictures: `[samples]`, what each sample shows: samples with one picture go to one fold, so that no classifier
            is tested on a picture that it has seen. By default all are different.
        folds: Each sample is tested once, by a classifier trained on all folds but its own.
        seed: Of the folds and of the shuffled labels.

    Raises:
        ValueError: Shapes that do not fit, states that are not finite, fewer than two labels, or fewer than two folds
            or fewer pictures than folds.
    """
    if (
        states.ndim != 3
        or len(labels) != states.shape[1]
        or len(labels if pictures is None else pictures) != len(labels)
    ):
        raise ValueError(
            f"states have shape {list(states.shape)} for {len(labels)} labels"
            + ("" if pictures is None else f" and {len(pictures)} pictures")
            + ": [layers, samples, width] and one of each a sample are needed"
        )
    finite = states.isfinite().all(-1).all(0)
    if not finite.all():
        raise ValueError(f"the states of sample {int(finite.int().argmin())} are not finite: has it no picture?")
    classes, group = _numbered(labels), _numbered(range(len(labels)) if pictures is None else pictures)
    if classes.max() < 1:
        raise ValueError("there are fewer than 2 different labels: nothing to tell apart")
    if not 2 <= folds <= group.max() + 1:
        raise ValueError(f"folds is {folds}: it must be at least 2 and at most the {group.max() + 1} pictures")

    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(classes)
    fold = torch.from_numpy(_dealt(classes, group, folds, generator))
    targets = torch.from_numpy(np.stack([classes, shuffled]))
    correct = torch.stack([_tested(layer.double().cpu(), targets, fold) for layer in states], dim=1).numpy()
    return Readout(*correct)


def _numbered(things: Sequence[Any]) -> Int[np.ndarray, " samples"]:
    """The same number for what is equal, in order of appearance."""
    plain = things.tolist() if isinstance(things, (Tensor, np.ndarray)) else things
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(thing, len(numbers)) for thing in plain])


def _dealt(
    classes: Int[np.ndarray, " samples"], group: Int[np.ndarray, " samples"], folds: int, generator: np.random.Generator
) -> Int[np.ndarray, " samples"]:
    """A fold for each sample: groups in random order, sorted by the label of their first sample, dealt like cards."""
    _, first = np.unique(group, return_index=True)
    order = np.lexsort((generator.permutation(len(first)), classes[first]))
    fold = np.empty(len(first), dtype=np.int64)
    fold[order] = np.arange(len(first)) % folds
    return fold[group]


def _tested(
    states: Float[Tensor, "samples width"], labels: Int[Tensor, "sets samples"], fold: Int[Tensor, " samples"]
) -> Bool[Tensor, "sets samples"]:
    """Out-of-fold correctness of one layer, for several sets of labels at once."""
    correct = torch.zeros(labels.shape, dtype=torch.bool)
    targets = torch.nn.functional.one_hot(labels).double()
    for number in range(int(fold.max()) + 1):
        test, train = fold == number, fold != number
        said = _ridge(states[train], targets[:, train], states[test]).argmax(-1)
        correct[:, test] = said == labels[:, test]
    return correct


def _ridge(
    train: Float[Tensor, "train width"], targets: Float[Tensor, "sets train classes"], test: Float[Tensor, "test width"]
) -> Float[Tensor, "sets test classes"]:
    """Ridge regression in its dual form, with the penalty that is best when each training row is left out in turn."""
    centre, spread = train.mean(0), train.std(0, unbiased=False)
    # A feature that varies by no more than the rounding of float32 says nothing.
    scale = torch.where(spread > 1e-6 * centre.abs(), 1 / spread, 0.0)
    train, test = (train - centre) * scale, (test - centre) * scale

    # Rows weighted so that every class weighs the same; their roots turn it into plain least squares.
    weight = (targets / targets.sum(1, keepdim=True).clamp(min=1)).sum(-1, keepdim=True)
    weight, root = weight / weight.sum(1, keepdim=True), weight.sqrt()
    middle, mean = (weight * train).sum(1, keepdim=True), (weight * targets).sum(1, keepdim=True)
    rows, wanted = root * (train - middle), root * (targets - mean)

    values, vectors = torch.linalg.eigh(rows @ rows.mT)
    values = values.clamp(min=0)
    penalties = values.mean(-1, keepdim=True).clamp(min=1e-12) * torch.tensor(PENALTIES, dtype=values.dtype)
    rotated = vectors.mT @ wanted
    # For each penalty: what is left of each eigenvector, the leverage of each row (its weight is the intercept's), and
    # the residuals that the rows would have if they were left out.
    kept = values[:, None] / (values[:, None] + penalties[..., None])
    leverage = kept @ vectors.square().mT + weight.mT
    fitted = torch.einsum("stv,spv,svc->sptc", vectors, kept, rotated)
    residuals = (wanted[:, None] - fitted) / (1 - leverage[..., None])
    best = penalties.gather(1, residuals.square().sum((2, 3)).argmin(1, keepdim=True))
    dual = vectors @ (rotated / (values + best)[..., None])
    return (test - middle) @ rows.mT @ dual + mean
