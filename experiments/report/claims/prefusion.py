"""Claims on pre-fusion: it rescues one visual token, every layer helps (paper, Table 6), and it works outside (Table 12)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from experiments.report.claims.claim import Case, Claim
from experiments.report.claims.families import INSIDE, comparable, find_families, make_case
from experiments.report.run_groups import RunGroup


def _rescue(groups: Sequence[RunGroup]) -> Iterator[Case]:
    for family in find_families(groups):
        cells = family.queries(size=1)
        if len(cells) > 1 and cells[0].layers == 0 and comparable((cells[0], cells[-1])):
            detail = f"1 token: {cells[-1].layers} against 0 layers"
            yield make_case([((cells[-1],), (cells[0],))], detail)


def _each_layer(groups: Sequence[RunGroup]) -> Iterator[Case]:
    for family in find_families(groups):
        cells = family.queries(size=1)
        # Two depths are one step, which is the claim of the rescue.
        if len(cells) > 2 and cells[0].layers == 0 and comparable(cells):
            depths = ", ".join(str(cell.layers) for cell in cells)
            yield make_case([((deep,), (shallow,)) for shallow, deep in pairwise(cells)], f"1 token: {depths} layers")


def _outside(groups: Sequence[RunGroup]) -> Iterator[Case]:
    for family in find_families(groups):
        for outside in family.queries(size=1):
            inside = family.find("query", 1, outside.layers, INSIDE)
            if inside is not None and comparable((outside, inside)):
                yield make_case([((outside,), (inside,))], f"1 token, {outside.layers} layers")


PREFUSION_RESCUES = Claim(
    "prefusion_rescues",
    "Table 6",
    "Pre-fusion raises the accuracy of one visual token",
    "difference",
    0.0,
    _rescue,
)
EACH_LAYER_HELPS = Claim(
    "each_layer_helps",
    "Table 6",
    "Each further pre-fusion layer helps",
    "difference",
    0.0,
    _each_layer,
)
OUTSIDE_BEATS_INSIDE = Claim(
    "outside_beats_inside",
    "Table 12",
    "Pre-fusion before the language model beats pre-fusion inside it",
    "difference",
    0.0,
    _outside,
)
