"""What a command line asks for: one cell or the cells of a sweep, named before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments.cell import Cell
from experiments.config import identity, plain, rows, schema
from experiments.config.rows import read
from experiments.data.load import load_data
from experiments.provenance import code_version
from experiments.sweeps.hydra_api import _compose


def measured(config: DictConfig) -> bool:
    """Whether a configuration asks for a measurement of this machine, which has no cell."""
    return config.bench is not None or config.cost is not None


def identify(config: DictConfig) -> Cell:
    """The cell of a composed configuration.

    Raises:
        ValueError, OSError, omegaconf.errors.OmegaConfBaseException: if the configuration is not one that can be run.
    """
    chosen = choose(config)
    typed: schema.Config = OmegaConf.to_object(chosen)  # type: ignore[assignment]
    resolved = plain.resolved(chosen)
    data = load_data(typed.data)
    label = (
        None if config.row is None else rows.read(config.name, OmegaConf.to_container(config.rows))[config.row].label
    )
    return Cell(typed, resolved, data, identity.identity(resolved, data.fingerprint, code_version()), label)


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Args:
        overrides: What it adds to the sweep's configuration.
        name: Its row, where it is one of a table, and what else sets it apart from the sweep's other jobs.
        cell: None for a measurement.
    """

    overrides: list[str]
    name: str
    cell: Cell | None


def expand(hydra: Hydra, overrides: Sequence[str]) -> tuple[DictConfig, list[Job]]:
    """The configuration of a sweep and its jobs, in the order in which `-m` runs them.

    Raises:
        ValueError, OSError, HydraException, omegaconf.errors.OmegaConfBaseException: if a configuration is not one that can
            be run.
    """
    sweep = hydra.compose_config("config", [*overrides, "hydra.mode=MULTIRUN"], RunMode.MULTIRUN)
    params = [f"{key}={value}" for key, value in (sweep.hydra.sweeper.params or {}).items()]
    parsed = OverridesParser.create(hydra.config_loader).parse_overrides([*params, *sweep.hydra.overrides.task])
    (jobs,) = BasicSweeper.split_arguments(parsed, None)
    shared = set(jobs[0]).intersection(*jobs)
    composed: dict[tuple[str, ...], DictConfig] = {}
    found = []
    for job in jobs:
        config = _compose(hydra, sweep, job, composed)
        cell = None if measured(config) else identify(config)
        apart = [override for override in job if override not in shared]
        if cell and cell.row:
            apart = [cell.row, *(override for override in apart if not override.startswith("row="))]
        found.append(Job(job, ", ".join(apart) or (cell.label if cell else config.name), cell))
    return sweep, found


def choose(config: DictConfig) -> DictConfig:
    """The configuration of the row that `row` names, or as it is where none is named; with the settings that fit the
    budget, where there is one.

    Raises:
        ValueError: if there is no such row, or nothing fits the budget.
        omegaconf.errors.OmegaConfBaseException: if a row's setting is no field of the configuration, or of another type.
    """
    chosen = config.copy()
    number = chosen.row
    if number is not None:
        rows = read(config.name, OmegaConf.to_container(chosen.rows, resolve=True))
        if not 0 <= number < len(rows):
            found = f"has rows 0 to {len(rows) - 1}" if rows else "has no rows"
            raise ValueError(f"row: no row {number}; experiment {config.name} {found}")
        for key, value in rows[number].settings.items():
            OmegaConf.update(chosen, key, value)
    chosen.rows, chosen.row = [], None
    if chosen.budget.method != "none":
        from experiments.sweeps.budget import settings  # imports torch, which hardly any row needs to be known

        for key, value in settings(chosen.model, **chosen.budget).items():
            OmegaConf.update(chosen, key, value)
    return chosen
