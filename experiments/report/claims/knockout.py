"""Claim on attention knock-out: text reads the image in the first half of the layers only (paper, section 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

from experiments.records.views import Record, parse_outcomes
from experiments.report.claims.claim import Case, Claim
from experiments.report.claims.image_need import if_image_is_needed
from experiments.report.claims.probed import probed_groups
from experiments.report.claims.removal import KEPT
from experiments.report.claims.shares import Share
from experiments.report.run_groups import RunGroup

_TOO_LITTLE = "over all windows, cutting text off costs too little to tell"
_TOO_WIDE = 10
"""Width at which windows that begin in the first half hold 90% of the damage of a layer right after it."""


def _cases(groups: Sequence[RunGroup]) -> Iterator[Case]:
    for group in probed_groups(groups, "knockout"):
        record = group.finished[0]
        layers, width = record["model"]["layers"], record["knockout"]["width"]
        if width >= _TOO_WIDE or any(other["knockout"]["width"] != width for other in group.finished):
            continue
        damage = np.stack([_damage(other) for other in group.finished])  # [seeds, windows, questions]
        starts = [min(run["layers"]) for run in record["knockout"]["windows"][1:]]
        early = np.asarray(starts) < layers / 2
        share = Share(damage[:, early].sum(1), damage.sum(1), KEPT, 0.0, _TOO_LITTLE)
        needed = if_image_is_needed(share, group.finished)
        yield Case(needed, (group,), group.config, f"windows of {width} in {layers} layers")


def _damage(record: Record) -> Float[np.ndarray, "windows questions"]:
    """Return what each window costs: the outcome of the intact model minus that with the window blocked."""
    outcomes = np.stack([parse_outcomes(run["correct"]) for run in record["knockout"]["windows"]]).astype(float)
    return outcomes[0] - outcomes[1:]


TEXT_READS_EARLY = Claim(
    "text_reads_early",
    "Section 3",
    "Text reads the image in the first half of the layers only",
    "share",
    KEPT,
    _cases,
)
