"""Claim on the compressor: learned queries beat average pooling (paper, Table 8)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from experiments.report.claims.claim import Case, Claim
from experiments.report.claims.families import comparable, find_families, make_case
from experiments.report.run_groups import RunGroup


def _cases(groups: Sequence[RunGroup]) -> Iterator[Case]:
    for family in find_families(groups):
        pairs = [
            (query, average)
            for query in family.queries(layers=family.most_layers)
            if family.most_layers
            and (average := family.find("average", query.size, query.layers)) is not None
            and comparable((query, average))
        ]
        if pairs:
            counts = " and ".join(str(query.size**2) for query, _ in pairs)
            detail = f"{counts} token{'s' * (counts != '1')}, {family.most_layers} layers"
            yield make_case([((query,), (average,)) for query, average in pairs], detail)


QUERY_BEATS_AVERAGE = Claim(
    "query_beats_average",
    "Table 8",
    "Compression by a learned query beats average pooling",
    "difference",
    0.0,
    _cases,
)
