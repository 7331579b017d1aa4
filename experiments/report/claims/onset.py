"""Claim on the onset: an image that arrives after half of the layers is worth nearly nothing (paper, Fig. 5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from experiments.records.views import parse_outcomes
from experiments.report.claims.claim import Case, Claim
from experiments.report.claims.image_need import NOT_NEEDED, if_image_is_needed
from experiments.report.claims.probed import probed_groups
from experiments.report.claims.removal import KEPT
from experiments.report.claims.shares import Share
from experiments.report.run_groups import RunGroup


def _cases(groups: Sequence[RunGroup]) -> Iterator[Case]:
    for group in probed_groups(groups, "onset"):
        runs = [record["onset"]["upto"] for record in group.finished]
        ends = [len(run["layers"]) for run in runs[0]]
        layers = group.finished[0]["model"]["layers"]
        half = max(end for end in ends if end <= layers / 2)
        if half == 0 or any([len(run["layers"]) for run in other] != ends for other in runs):
            continue
        intact, late, never = (
            np.stack([parse_outcomes(seed[ends.index(end)]["correct"]) for seed in runs]).astype(float)
            for end in (0, half, layers)
        )
        share = Share(intact - late, intact - never, KEPT, 0.0, NOT_NEEDED)
        needed = if_image_is_needed(share, group.finished)
        yield Case(needed, (group,), group.config, f"vision hidden in the first {half} of {layers} layers")


IMAGE_NEEDED_EARLY = Claim(
    "image_needed_early",
    "Figure 5",
    "Hiding the image in the first half of the layers costs nearly all that it is worth",
    "share",
    KEPT,
    _cases,
)
