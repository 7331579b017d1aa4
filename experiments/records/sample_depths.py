"""Fusion depth and onset of single samples, from the outcomes by layer that a record holds.

docs/fusion_depth.md has the formulas. They are those of a set of samples (`probes.fusion`) with one sample's own curve in place
of the mean, and a total above 0 in place of its interval. Here they are without torch, for reports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from experiments.records.views import parse_outcomes

THRESHOLD = 0.9
"""Share that the first layers must reach: `threshold` of `probes.fusion_depth`."""
ATTENTION_FLOOR = 1e-3
"""Attention mass that counts as none: `ATTENTION_FLOOR` of `probes.fusion.depth`."""
_ROUNDING_SLACK = 1e-9
_IMAGE_PAIR = ["instruction", "vision"]

Depths = list[int | None]


def removal_depths(removal: Mapping[str, Any]) -> Depths:
    """Return how many first layers each sample needs the image in: from there on, hiding it leaves the answer right.

    Args:
        removal: The part `removal` of a record.

    Returns:
        The smallest measured k such that the answer is right without the image from layer j on, for all j >= k. None if the
        answer is wrong with the image, or right without it in every layer.

    Example:
        >>> right = {(0, 1, 2): "0011", (1, 2): "1010", (2,): "1110", (): "1110"}  # by the layers without the image
        >>> removal_depths({"onward": [{"layers": list(k), "correct": v} for k, v in right.items()]})
        [1, 2, None, None]
    """
    right = _right(removal["onward"])
    layers = len(removal["onward"][0]["layers"])
    first_layers = [layers - len(run["layers"]) for run in removal["onward"]]
    last_wrong = len(right) - 1 - (~right)[::-1].argmax(0)
    located = right[-1] & ~right[0]
    return [first_layers[last + 1] if found else None for last, found in zip(last_wrong.tolist(), located, strict=True)]


def onset_layers(onset: Mapping[str, Any]) -> Depths:
    """Return the first layer, counted from 1, that each sample needs the image in.

    Args:
        onset: The part `onset` of a record.

    Returns:
        The layer after the last measured number of first layers in which the image can be hidden with a right answer. None if
        the answer is wrong with the image, or right without it in every layer.

    Example:
        >>> right = {(): "1101", (0,): "1101", (0, 1): "0001"}  # by the layers without the image
        >>> onset_layers({"upto": [{"layers": list(k), "correct": v} for k, v in right.items()]})
        [2, 2, None, None]
    """
    right = _right(onset["upto"])
    hidden = [len(run["layers"]) for run in onset["upto"]]
    last_right = len(right) - 1 - right[::-1].argmax(0)
    located = right[0] & ~right[-1]
    return [hidden[last] + 1 if found else None for last, found in zip(last_right.tolist(), located, strict=True)]


def knockout_depths(knockout: Mapping[str, Any]) -> Depths:
    """Return the number of first layers in which 90% of the windows begin that make each sample's answer wrong.

    Args:
        knockout: The part `knockout` of a record.

    Returns:
        The depths. None if the answer is wrong with the image, or no window makes it wrong.

    Example:
        >>> right = {(): "110", (0,): "010", (1,): "011", (2,): "111"}  # by the layers of the window
        >>> knockout_depths({"windows": [{"layers": list(k), "correct": v} for k, v in right.items()]})
        [2, None, None]
    """
    intact, *windows = knockout["windows"]
    damaged = ~_right(windows) & _right([intact])
    layers = 1 + max(window["layers"][-1] for window in windows)
    begins = np.array([window["layers"][0] for window in windows])
    by_layer = np.stack([damaged[begins == layer].sum(0) for layer in range(layers)]).astype(float)
    return _first_layers(by_layer, by_layer.sum(0) > 0)


def attention_depths(attention: Mapping[str, Any]) -> Depths:
    """Return the number of first layers that hold 90% of the attention from the instruction to each sample's image.

    Args:
        attention: The part `attention` of a record.

    Returns:
        The depths, for as many samples as attention was recorded on. None if no layer's mass is above 0.001.

    Example:
        >>> attention_depths({"pairs": [["instruction", "vision"]], "mass": [[[0.6, 0.0005], [0.3, 0], [0.1, 0]]]})
        [2, None]
    """
    mass = np.array(image_attention(attention), dtype=float)
    return _first_layers(mass, np.nan_to_num(mass).max(0) > ATTENTION_FLOOR)


def image_attention(attention: Mapping[str, Any]) -> list[list[float | None]]:
    """Return the attention mass from the instruction to the image, [layers, samples], mean over heads.

    Args:
        attention: The part `attention` of a record.

    Example:
        >>> image_attention({"pairs": [["response", "vision"], ["instruction", "vision"]], "mass": [[[0.1]], [[0.6]]]})
        [[0.6]]
    """
    return attention["mass"][list(map(list, attention["pairs"])).index(_IMAGE_PAIR)]


def outcomes_with_and_without_image(
    probes: Mapping[str, Any],
) -> tuple[Bool[np.ndarray, " samples"] | None, Bool[np.ndarray, " samples"] | None]:
    """Return which answers are right with the image, and with it hidden in every layer. None if not measured.

    Args:
        probes: Parts of a record by name; `removal`, `onset` and `knockout` hold these outcomes.

    Example:
        >>> upto = [{"layers": [], "correct": "11"}, {"layers": [0], "correct": "10"}]
        >>> [outcomes.tolist() for outcomes in outcomes_with_and_without_image({"onset": {"upto": upto}})]
        [[True, True], [True, False]]
    """
    if removal := probes.get("removal"):
        return _right(removal["onward"][-1:])[0], _right(removal["onward"][:1])[0]
    if onset := probes.get("onset"):
        return _right(onset["upto"][:1])[0], _right(onset["upto"][-1:])[0]
    if knockout := probes.get("knockout"):
        return _right(knockout["windows"][:1])[0], None
    return None, None


def _right(runs: Sequence[Mapping[str, Any]]) -> Bool[np.ndarray, "runs samples"]:
    return np.stack([parse_outcomes(run["correct"]) for run in runs]).astype(bool)


def _first_layers(by_layer: Float[np.ndarray, "layers samples"], located: Bool[np.ndarray, " samples"]) -> Depths:
    """Return the smallest k for which the first k layers have `THRESHOLD` of each sample's total, None where not located."""
    reached = by_layer.cumsum(0) >= by_layer.sum(0) * THRESHOLD - _ROUNDING_SLACK
    return [int(k) + 1 if found else None for k, found in zip(reached.argmax(0), located, strict=True)]
