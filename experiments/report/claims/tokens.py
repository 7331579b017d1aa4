"""Claims on the number of visual tokens, without (paper, Table 6) and with pre-fusion (Table 7)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from experiments.records.views import record_seed
from experiments.report.claims.claim import Case, Claim
from experiments.report.claims.families import Cell, Family, comparable, find_families, make_case
from experiments.report.run_groups import RunGroup


def _without(groups: Sequence[RunGroup]) -> Iterator[Case]:
    for family in find_families(groups):
        yield from _ends(family.queries(layers=0))


def _with(groups: Sequence[RunGroup]) -> Iterator[Case]:
    for family in find_families(groups):
        if family.most_layers:
            yield from _ends(family.queries(layers=family.most_layers))


def _ends(cells: Sequence[Cell]) -> Iterator[Case]:
    if len(cells) > 1 and comparable((cells[0], cells[-1])):
        yield make_case([((cells[-1],), (cells[0],))], f"{_counts(cells)}, {cells[0].layers} layers")


def _matter_less(groups: Sequence[RunGroup]) -> Iterator[Case]:
    for family in find_families(groups):
        corners = _corners(family)
        if len(corners) == 4:
            few, many, few_fused, many_fused = corners
            detail = f"{_counts((few, many))}: 0 against {few_fused.layers} layers"
            yield make_case([((many, few_fused), (few, many_fused))], detail)


def _corners(family: Family) -> list[Cell]:
    """Return fewest and most tokens without pre-fusion, then with it, on the seeds that all four share; [] if missing."""
    layers = family.most_layers
    fused = {cell.size: cell for cell in family.queries(layers=layers)}
    plain = {cell.size: cell for cell in family.queries(layers=0)}
    sizes = sorted(plain.keys() & fused.keys())
    if not layers or len(sizes) < 2:
        return []
    cells = [plain[sizes[0]], plain[sizes[-1]], fused[sizes[0]], fused[sizes[-1]]]
    seeds = set.intersection(*({record_seed(record) for record in cell.group.finished} for cell in cells))
    # A sum of accuracies can be tested only if each has the same number of seeds.
    return [_on_seeds(cell, seeds) for cell in cells] if seeds and comparable(cells) else []


def _on_seeds(cell: Cell, seeds: set[int | None]) -> Cell:
    kept = tuple(record for record in cell.group.finished if record_seed(record) in seeds)
    return replace(cell, group=replace(cell.group, finished=kept))


def _counts(cells: Sequence[Cell]) -> str:
    return f"{cells[-1].size ** 2} against {cells[0].size ** 2} token{'s' * (cells[0].size > 1)}"


TOKENS_WITHOUT = Claim(
    "tokens_without",
    "Table 6",
    "Without pre-fusion, more visual tokens help",
    "difference",
    0.0,
    _without,
)
TOKENS_WITH = Claim(
    "tokens_with",
    "Table 7",
    "With pre-fusion, more visual tokens still help",
    "difference",
    0.0,
    _with,
)
TOKENS_MATTER_LESS = Claim(
    "tokens_matter_less",
    "Tables 6, 7",
    "With pre-fusion, more visual tokens help less than without",
    "difference",
    0.0,
    _matter_less,
)
