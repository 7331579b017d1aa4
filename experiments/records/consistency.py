"""Checks that the parts of a record fit together; `experiments.records.schema` has the types of the parts.

Each raises ValueError in one line that begins with the field.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def check_length(path: str, outcomes: str | None, examples: int) -> None:
    """Check that outcomes have one character for each example."""
    if outcomes is not None and len(outcomes) != examples:
        raise ValueError(f"{path}: has {len(outcomes)} outcomes for {examples} examples")


def check_removal(removal: Any, layers: int, examples: int) -> None:
    """Check that removal goes from all layers to none, and that its blocks are layers of the model."""
    for part in ("inside", "onward", "random_inside"):
        runs = getattr(removal, part) or []
        for index, run in enumerate(runs):
            check_length(f"removal.{part}[{index}].correct", run.correct, examples)
            if not set(run.layers) <= set(range(layers)):
                raise ValueError(f"removal.{part}[{index}].layers: {run.layers} are not layers of a model of {layers}")
        if part != "onward" and not all(run.layers for run in runs):
            raise ValueError(f"removal.{part}: has a block without layers")
    starts = [layers - len(run.layers) for run in removal.onward]
    tails = [list(range(start, layers)) for start in starts]
    if tails != [run.layers for run in removal.onward] or sorted({0, layers, *starts}) != starts:
        raise ValueError(f"removal.onward: must go from all {layers} layers to none, each from one layer to the last")


def check_onset(onset: Any, layers: int, examples: int) -> None:
    """Check that the onset's runs hide the image in the first layers, from none to all."""
    ends = [len(run.layers) for run in onset.upto]
    if [list(range(end)) for end in ends] != [run.layers for run in onset.upto] or sorted({0, layers, *ends}) != ends:
        raise ValueError(f"onset.upto: must go from no layer to all {layers}, each from the first layer to one")
    for index, run in enumerate(onset.upto):
        check_length(f"onset.upto[{index}].correct", run.correct, examples)


def check_knockout(knockout: Any, layers: int, examples: int) -> None:
    """Check that knock-out has the intact model and all windows of its width."""
    width = knockout.width
    windows = [list(range(max(end - width, 0), min(end, layers))) for end in range(1, layers + width)]
    if [run.layers for run in knockout.windows] != [[], *windows]:
        raise ValueError(f"knockout.windows: must be the intact model and all windows of {width} of {layers} layers")
    for index, run in enumerate(knockout.windows):
        check_length(f"knockout.windows[{index}].correct", run.correct, examples)


def check_depths(part: str, depths: Sequence[Any], names: Sequence[str], samples: int, layers: int) -> None:
    """Check that a read-out has an entry after 0, 1, ... all layers."""
    if len(depths) != layers + 1:
        raise ValueError(f"{part}.depths: has {len(depths)} entries, not {layers + 1} for a model of {layers} layers")
    for index, entry in enumerate(depths):
        for name in names:
            check_length(f"{part}.depths[{index}].{name}", getattr(entry, name), samples)


def check_patch_words(part: Any, layers: int) -> None:
    """Check that words of patches have an entry after 0, 1, ... all layers, with a count for each image."""
    if len(part.depths) != layers + 1:
        raise ValueError(
            f"patch_words.depths: has {len(part.depths)} entries, not {layers + 1} for a model of {layers} layers"
        )
    counts = [("patches", part.patches)]
    for index, entry in enumerate(part.depths):
        counts += [(f"depths[{index}].{lens}.right", getattr(entry, lens).right) for lens in ("logit", "contextual")]
    for path, values in counts:
        if len(values) != part.images:
            raise ValueError(f"patch_words.{path}: has {len(values)} counts for {part.images} images")
        if any(value > patches for value, patches in zip(values, part.patches, strict=True)):
            raise ValueError(f"patch_words.{path}: has more patches of an image than lie on objects")


def check_swaps(swaps: Any, layers: int) -> None:
    """Check that the curves of swaps have a point for each number of layers, or none without a layer."""
    for name, entry in swaps.properties.items():
        points = 0 if entry.layer is None else layers + 1
        for curve in ("moved", "moved_low", "moved_high", "flipped"):
            if (length := len(getattr(entry, curve))) != points:
                raise ValueError(f"swaps.properties.{name}.{curve}: has {length} points, not {points}")


def check_attention(attention: Any, layers: int) -> None:
    """Check the shapes of attention's statistics."""
    pairs, samples = len(attention.pairs), attention.samples
    control = attention.control
    arrays: list[tuple[str, Any, tuple[int, ...]]] = [
        ("mass", attention.mass, (pairs, layers, samples)),
        ("entropy", attention.entropy, (pairs, layers, samples)),
        ("uniform_mass", attention.uniform_mass, (pairs,)),
        ("uniform_entropy", attention.uniform_entropy, (pairs,)),
        ("control.mass", control and control.mass, (pairs, layers)),
        ("control.entropy", control and control.entropy, (pairs, layers)),
    ]
    for name, values, shape in arrays:
        _check_shape(f"attention.{name}", values, shape)


def check_contribution(contribution: Any, layers: int) -> None:
    """Check the shapes of contributions; the number of heads is not in the record."""
    pairs, by_head = len(contribution.pairs), contribution.by_head
    heads = len(by_head[0][0]) if by_head and by_head[0] else 0
    _check_shape("contribution.share", contribution.share, (pairs, layers, contribution.samples))
    _check_shape("contribution.by_head", by_head, (pairs, layers, heads))


def _check_shape(path: str, values: Any, shape: tuple[int, ...]) -> None:
    """Check the shape of nested lists; None passes."""
    if values is None:
        return
    try:
        found = np.asarray(values, dtype=float).shape
    except ValueError:
        raise ValueError(f"{path}: its rows differ in length; must have shape {shape}") from None
    if found != shape:
        raise ValueError(f"{path}: must have shape {shape}, found {found}")


def check_sinks(sinks: Any, layers: int) -> None:
    """Check that counts of sinks have a number for each layer and sample."""
    masses = {f"mass[{index}]": rows for index, rows in enumerate(sinks.mass)}
    for name, rows in {"by_attention": sinks.by_attention, "by_value": sinks.by_value, **masses}.items():
        if (lengths := [len(row) for row in rows]) != [sinks.samples] * layers:
            raise ValueError(f"sinks.{name}: must have {layers} rows of {sinks.samples} samples, found {lengths}")
