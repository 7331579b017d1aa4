"""Claims on attention: text attends to the image early, the image adds to text early, and attention is even early."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments.report.claims.claim import Case, Claim
from experiments.report.claims.probed import probed_groups
from experiments.report.claims.shares import Share
from experiments.report.run_groups import RunGroup

LINE = 0.525
"""Share of the first third in both thirds: a tenth more than the last third."""
CONTRIBUTION_LINE = 0.6
"""Line of contributions: half as much again as the last third. Models with random weights reach 58.5%."""
_FLOOR = 0.001
"""Mean of both thirds at or below which there is nothing to share: as the mass that a fusion depth needs."""


def _cases(part: str, quantity: str, line: float, groups: Sequence[RunGroup]) -> Iterator[Case]:
    for group in probed_groups(groups, part):
        curves = [curve for record in group.finished if (curve := _vision_curve(record[part], quantity)) is not None]
        if len(curves) < len(group.finished) or len({curve.shape for curve in curves}) > 1 or len(curves[0]) < 2:
            continue
        stacked = np.stack(curves)  # [seeds, layers, questions]
        third = max(stacked.shape[1] // 3, 1)
        first, last = stacked[:, :third].mean(1), stacked[:, -third:].mean(1)
        share = Share(first, first + last, line, 2 * _FLOOR, "no attention on the image", least=0.0)
        yield Case(share, (group,), group.config, f"first and last {third} of {stacked.shape[1]} layers")


def _vision_curve(part: Mapping[str, Any], quantity: str) -> Float[np.ndarray, "layers questions"] | None:
    """Return a quantity of attention to vision, mean over the text targets for which it is defined; None without any."""
    rows = [
        part[quantity][number]
        for number, (target, source) in enumerate(part["pairs"])
        if source == "vision" and target in ("instruction", "response")
    ]
    if not rows:
        return None
    values = np.asarray(rows, dtype=float)
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(defined, values, 0).sum(0) / defined.sum(0)


ATTENTION_EARLY = Claim(
    "attention_early",
    "Figure 2",
    "Text attends to the image more in the first third of the layers than in the last",
    "share",
    LINE,
    partial(_cases, "attention", "mass", LINE),
)
CONTRIBUTION_EARLY = Claim(
    "contribution_early",
    "Figure 2",
    "The image adds half as much again to text in the first third of the layers as in the last",
    "share",
    CONTRIBUTION_LINE,
    partial(_cases, "contribution", "share", CONTRIBUTION_LINE),
)
ENTROPY_EARLY = Claim(
    "entropy_early",
    "Figure 3",
    "This attention spreads over more of the image in the first third than in the last",
    "share",
    LINE,
    partial(_cases, "attention", "entropy", LINE),
)
