"""Families of runs that differ only in compressor, token count, and number and location of pre-fusion layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.records.views import start_time
from experiments.report.claims.claim import Case
from experiments.report.claims.steps import Step, Steps
from experiments.report.formatting import setting_value
from experiments.report.run_groups import RunGroup

OUTSIDE, INSIDE = "outside", "inside"
_AXES = ("compressor.name", "compressor.size", "prefusion.layers", "prefusion.location")
_FINGERPRINT, _FILES = "fingerprint", "files"


@dataclass(frozen=True)
class Cell:
    """One configuration with its seeds.

    Args:
        group: Its runs; at least one is finished.
        compressor: Name of the compressor, "none" without one.
        size: C of its C x C visual tokens.
        layers: Number of pre-fusion layers.
        location: `OUTSIDE` or `INSIDE`.
        rest: All other settings that have an effect, the fingerprint of the data, and the files of the model.
    """

    group: RunGroup
    compressor: str
    size: int
    layers: int
    location: str
    rest: Mapping[str, Any]

    @property
    def outcomes(self) -> Any:
        """0/1 outcomes, [seeds, questions]."""
        return self.group.outcomes()


@dataclass(frozen=True)
class Family:
    """Cells that differ only in the axes; each occurs once."""

    cells: tuple[Cell, ...]

    def queries(self, layers: int | None = None, size: int | None = None) -> list[Cell]:
        """Return the cells with a query compressor outside the language model, by layers and size.

        Args:
            layers: Only those with so many pre-fusion layers; None for all.
            size: Only those with so many tokens a side; None for all with at least one token.
        """
        return sorted(
            (
                cell
                for cell in self.cells
                if cell.compressor == "query"
                and cell.location == OUTSIDE
                and layers in (None, cell.layers)
                and (cell.size > 0 if size is None else cell.size == size)
            ),
            key=lambda cell: (cell.layers, cell.size),
        )

    @property
    def most_layers(self) -> int:
        """The largest number of pre-fusion layers outside the language model; 0 if no cell has any."""
        return max((cell.layers for cell in self.queries()), default=0)

    def find(self, compressor: str, size: int, layers: int, location: str = OUTSIDE) -> Cell | None:
        """Return the cell with these settings, None if there is none."""
        wanted = (compressor, size, layers, location)
        return next((c for c in self.cells if (c.compressor, c.size, c.layers, c.location) == wanted), None)


def find_families(groups: Iterable[RunGroup]) -> list[Family]:
    """Return the families of runs, one for each combination of other settings.

    For example three cells: no pre-fusion; 4 layers that start as copies; 4 layers that start fresh. The last two differ in
    `prefusion.init`, which makes two families. The first cell belongs to both.

    A cell without pre-fusion belongs to every family whose other settings it shares, whatever the settings of pre-fusion
    are there: they have no effect on it. The same holds for a cell without a compressor. Of several cells that differ in
    such settings alone, a family has the one with the most seeds, and among these the newest.

    Args:
        groups: All runs of a results folder.
    """
    cells = [cell for group in groups if (cell := _make_cell(group)) is not None]
    families = []
    for settings in _most_specific([cell.rest for cell in cells]):
        members: dict[tuple, Cell] = {}
        for cell in cells:
            if cell.rest.items() <= settings.items():
                axes = (cell.compressor, cell.size, cell.layers, cell.location)
                if axes not in members or _evidence(cell) > _evidence(members[axes]):
                    members[axes] = cell
        families.append(Family(tuple(members.values())))
    return families


def make_case(steps: Sequence[tuple[Sequence[Cell], Sequence[Cell]]], detail: str) -> Case:
    """Return the case of a claim that puts some cells above others.

    Args:
        steps: The cells whose accuracies are added, and those whose are subtracted, for each step.
        detail: What was compared.
    """
    cells = list({id(cell): cell for step in steps for part in step for cell in part}.values())
    made = [Step(tuple(cell.outcomes for cell in a), tuple(cell.outcomes for cell in b)) for a, b in steps]
    settings = {key: value for cell in cells for key, value in cell.rest.items()}
    return Case(Steps(made), tuple(cell.group for cell in cells), settings, detail)


def comparable(cells: Iterable[Cell]) -> bool:
    """Return whether cells have equally many questions, so that these can be paired by index."""
    return len({cell.outcomes.shape[1] for cell in cells}) == 1


def _make_cell(group: RunGroup) -> Cell | None:
    config = group.config
    if not group.finished or not all(key in config for key in _AXES[:3]):
        return None
    compressor, size, layers = (config[key] for key in _AXES[:3])
    location = config.get(_AXES[3], OUTSIDE)
    unused = [
        *(["prefusion.", "train.prefusion_"] if not layers else []),
        *(["compressor."] if compressor == "none" else []),
    ]
    rest = {k: setting_value(v) for k, v in config.items() if k not in _AXES and not k.startswith(tuple(unused))}
    files = {k: v for k, v in group.model_files.items() if not k.startswith(tuple(unused))}
    return Cell(
        group,
        compressor,
        size,
        layers,
        location,
        {**rest, _FINGERPRINT: group.fingerprint, _FILES: str(sorted(files.items()))},
    )


def _most_specific(settings: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the distinct combinations of settings that are not part of another one."""
    distinct = list({tuple(sorted(one.items())): one for one in settings}.values())
    return [one for one in distinct if not any(one.items() < other.items() for other in distinct)]


def _evidence(cell: Cell) -> tuple[int, str]:
    """Return a sort key by which one of several runs of a cell is chosen: the most seeds, then the newest."""
    return len(cell.group.finished), max(map(start_time, cell.group.finished))
