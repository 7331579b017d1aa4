"""Claims on the removal of visual tokens (paper, Fig. 5): the first block costs most, and the image can leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import UInt8

from experiments.records.views import Record, layers_with_vision, parse_outcomes
from experiments.report.claims.claim import Case, Claim
from experiments.report.claims.image_need import NOT_NEEDED, if_image_is_needed
from experiments.report.claims.probed import probed_groups
from experiments.report.claims.shares import Share
from experiments.report.claims.steps import Step, Steps
from experiments.report.run_groups import RunGroup

KEPT = 0.9
"""Share of the image's worth that must be kept: the threshold of the fusion depth."""


def _image_may_leave(groups: Sequence[RunGroup]) -> Iterator[Case]:
    for group in probed_groups(groups, "removal"):
        record = group.finished[0]
        layers = record["model"]["layers"]
        kept = layers_with_vision(record)
        half = max(count for count in kept if count <= layers / 2)
        if half == 0 or any(layers_with_vision(other) != kept for other in group.finished):
            continue
        none, some, all_layers = (
            np.stack([_outcomes(run["removal"]["onward"], kept.index(count)) for run in group.finished]).astype(float)
            for count in (0, half, layers)
        )
        share = Share(some - none, all_layers - none, KEPT, 0.0, NOT_NEEDED)
        needed = if_image_is_needed(share, group.finished)
        yield Case(needed, (group,), group.config, f"vision in the first {half} of {layers} layers")


def _first_block(groups: Sequence[RunGroup]) -> Iterator[Case]:
    for group in probed_groups(groups, "removal"):
        blocks = [[run["layers"] for run in record["removal"]["inside"]] for record in group.finished]
        if len(blocks[0]) < 2 or any(other != blocks[0] for other in blocks):
            continue
        first, *later = [
            np.stack([_outcomes(record["removal"]["inside"], number) for record in group.finished])
            for number in range(len(blocks[0]))
        ]
        steps = Steps([Step((block,), (first,), same_models=True) for block in later])
        detail = f"{len(blocks[0])} blocks of {len(blocks[0][0])} layer{'s' * (len(blocks[0][0]) > 1)}"
        hidden = np.stack([_outcomes(record["removal"]["onward"], 0) for record in group.finished])
        yield Case(if_image_is_needed(steps, group.finished, hidden), (group,), group.config, detail)


def _outcomes(runs: Sequence[Record], number: int) -> UInt8[np.ndarray, " questions"]:
    return parse_outcomes(runs[number]["correct"])


FIRST_BLOCK = Claim(
    "first_block",
    "Figure 5",
    "Hiding the image inside the first block of layers costs most",
    "difference",
    0.0,
    _first_block,
)
IMAGE_MAY_LEAVE = Claim(
    "image_may_leave",
    "Figure 5",
    "The image can leave after half of the layers",
    "share",
    KEPT,
    _image_may_leave,
)
