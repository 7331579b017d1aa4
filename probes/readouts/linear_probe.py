"""Cross-validated linear classifiers of labels from hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Ridge penalties to choose from, as multiples of the mean eigenvalue of the training states' Gram matrix (samples by
# samples).
RIDGE_PENALTIES = (1e-4, 1e-2, 1e0, 1e2, 1e4)


@dataclass(frozen=True, eq=False)
class Readout:
    """Correctness of a linear classifier, for each sample by a classifier that was not trained on it.

    Attributes:
        correct: `[layers, samples]`, for the given labels.
        control: `[layers, samples]`, for the same labels shuffled over the samples: the size of the states alone gives
            this accuracy.

    Example:
        >>> from probes import linear_readout
        >>> readout = linear_readout(torch.eye(2).repeat(3, 10, 1), ["cat", "dog"] * 10)
        >>> readout.accuracy.tolist()  # layers
        [1.0, 1.0, 1.0]
    """

    correct: Bool[np.ndarray, "layers samples"]
    control: Bool[np.ndarray, "layers samples"]

    @property
    def accuracy(self) -> Float[np.ndarray, " layers"]:
        """Return the share of correct labels, from 0 to 1."""
        return self.correct.mean(axis=1)

    @property
    def selectivity(self) -> Float[np.ndarray, " layers"]:
        """Return the accuracy minus that on shuffled labels (after Hewitt and Liang 2019, arXiv 1909.03368)."""
        return self.accuracy - self.control.mean(axis=1)


def linear_readout(
    states: Float[Tensor, "layers samples width"],
    labels: Sequence[Any],
    *,
    pictures: Sequence[Any] | None = None,
    folds: int = 5,
    seed: int = 0,
) -> Readout:
    """Train a linear classifier for each layer and fold, and test it on the samples of that fold.

    The classifier is ridge regression in closed form. Features are standardised on the training samples. Each label is
    one target: 1 for its samples, 0 for others. All labels have the same weight, whatever their number of samples, and
    the largest output wins. So states without information score 1 / number of labels if all labels have equally many
    samples. Otherwise they score more, up to the share of the most frequent label: the control gives the chance level.

    The penalty is the one of `RIDGE_PENALTIES` with the least squared error when each training sample is left out in
    turn. This needs no second training, and the test samples play no part in it. Folds are assigned label by label, so
    that each holds nearly the same share of every label. All is computed in float64, and the same input gives the same
    output.

    Args:
        states: States of one position, or the mean over several; for example `probes.fusion.curves.text_states`.
        labels: `[samples]`, the label to read from each sample; hashable.
        pictures: `[samples]`, an identifier of each sample's image. Samples with the same image are in the same fold,
            so that no classifier is tested on an image that it was trained on. By default all images are different.
        folds: Number of folds. Each sample is tested once, by a classifier trained on all folds but its own.
        seed: Seed of the folds and of the shuffled labels.

    Returns:
        Whether each sample's label was predicted, for the labels and for the shuffled labels.

    Raises:
        ValueError: Shapes that do not fit; states that are not finite; fewer than two different labels; fewer than two
            folds; or fewer images than folds.

    Example:
        >>> from probes import linear_readout
        >>> states = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))
        >>> labels = [sample % 2 for sample in range(40)]
        >>> states[1, :, 0] += 10 * torch.tensor(labels)  # layer 1 separates the labels
        >>> float(linear_readout(states, labels).accuracy[1])
        1.0
    """
    if (
        states.ndim != 3
        or len(labels) != states.shape[1]
        or len(labels if pictures is None else pictures) != len(labels)
    ):
        raise ValueError(
            f"states have shape {list(states.shape)} for {len(labels)} labels"
            + ("" if pictures is None else f" and {len(pictures)} pictures")
            + ": pass states of shape [layers, samples, width] and one label (and picture) for each sample"
        )
    finite = states.isfinite().all(-1).all(0)
    if not finite.all():
        raise ValueError(
            f"the states of sample {int(finite.int().argmin())} are not finite: leave out samples without an image"
        )
    classes = _number_distinct(labels)
    image_numbers = _number_distinct(range(len(labels)) if pictures is None else pictures)
    if classes.max() < 1:
        raise ValueError("there are fewer than 2 different labels: a classifier needs at least 2")
    if not isinstance(folds, int | np.integer) or not 2 <= folds <= image_numbers.max() + 1:
        raise ValueError(
            f"folds is {folds!r}: it must be a whole number, at least 2 and at most the {image_numbers.max() + 1} pictures"
        )

    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(classes)
    sample_folds = torch.from_numpy(_assign_folds(classes, image_numbers, folds, generator))
    label_sets = torch.from_numpy(np.stack([classes, shuffled]))
    correct = torch.stack(
        [_is_correct_out_of_fold(layer.double().cpu(), label_sets, sample_folds) for layer in states], dim=1
    ).numpy()
    return Readout(*correct)


def _number_distinct(values: Sequence[Any]) -> Int[np.ndarray, " samples"]:
    """Number distinct values in order of appearance; equal values get the same number."""
    plain = values.tolist() if isinstance(values, (Tensor, np.ndarray)) else values
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in plain])


def _assign_folds(
    classes: Int[np.ndarray, " samples"],
    image_numbers: Int[np.ndarray, " samples"],
    folds: int,
    generator: np.random.Generator,
) -> Int[np.ndarray, " samples"]:
    """Return a fold for each sample.

    Images are shuffled, sorted by the label of their first sample, and assigned to the folds in turn.
    """
    _, first_samples = np.unique(image_numbers, return_index=True)
    order = np.lexsort((generator.permutation(len(first_samples)), classes[first_samples]))
    image_folds = np.empty(len(first_samples), dtype=np.int64)
    image_folds[order] = np.arange(len(first_samples)) % folds
    return image_folds[image_numbers]


def _is_correct_out_of_fold(
    states: Float[Tensor, "samples width"], labels: Int[Tensor, "sets samples"], folds: Int[Tensor, " samples"]
) -> Bool[Tensor, "sets samples"]:
    """Return the out-of-fold correctness of one layer, for several sets of labels at once."""
    correct = torch.zeros(labels.shape, dtype=torch.bool)
    targets = torch.nn.functional.one_hot(labels).double()
    for fold in range(int(folds.max()) + 1):
        test, train = folds == fold, folds != fold
        predicted = _ridge_outputs(states[train], targets[:, train], states[test]).argmax(-1)
        correct[:, test] = predicted == labels[:, test]
    return correct


def _ridge_outputs(
    train: Float[Tensor, "train width"], targets: Float[Tensor, "sets train classes"], test: Float[Tensor, "test width"]
) -> Float[Tensor, "sets test classes"]:
    """Fit ridge regression and return its outputs for the test rows.

    The penalty is the one with the least squared error when each training row is left out in turn.
    """
    centre, spread = train.mean(0), train.std(0, unbiased=False)
    # A feature that varies by no more than the rounding of float32 carries no information.
    scale = torch.where(spread > 1e-6 * centre.abs(), 1 / spread, 0.0)
    train, test = (train - centre) * scale, (test - centre) * scale

    # Rows are weighted so that every class has the same weight. Scaling rows by the roots gives plain least squares.
    weight = (targets / targets.sum(1, keepdim=True).clamp(min=1)).sum(-1, keepdim=True)
    weight, root = weight / weight.sum(1, keepdim=True), weight.sqrt()
    train_mean, target_mean = (weight * train).sum(1, keepdim=True), (weight * targets).sum(1, keepdim=True)
    rows, row_targets = root * (train - train_mean), root * (targets - target_mean)

    test_rows = test - train_mean
    if rows.shape[-1] > rows.shape[-2]:  # the rows span no more directions than there are rows
        basis = torch.linalg.qr(rows.mT).Q
        rows, test_rows = rows @ basis, test_rows @ basis
    values, vectors = torch.linalg.eigh(rows.mT @ rows)
    values = values.clamp(min=0)
    mean_eigenvalue = values.sum(-1, keepdim=True) / rows.shape[-2]  # of rows @ rows.mT, which has the same sum
    penalties = mean_eigenvalue.clamp(min=1e-12) * torch.tensor(RIDGE_PENALTIES, dtype=values.dtype)
    rotated = rows @ vectors
    products = rotated.mT @ row_targets
    # For each penalty: the leverage of each row (its weight is the part of the intercept), and the residual of each row
    # if it were left out.
    inverses = 1 / (values[:, None] + penalties[..., None])
    leverage = inverses @ rotated.square().mT + weight.mT
    fitted = rotated[:, None] @ (inverses[..., None] * products[:, None])
    residuals = (row_targets[:, None] - fitted) / (1 - leverage[..., None])
    best = penalties.gather(1, residuals.square().sum((2, 3)).argmin(1, keepdim=True))
    return test_rows @ vectors @ (products / (values + best)[..., None]) + target_mean
