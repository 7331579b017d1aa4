"""What a command line asks for: one cell, or the cells of a sweep. Nothing heavy is imported to name them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ValidationError

from experiments.cell import Cell
from experiments.config.identity import cell_identity
from experiments.config.plain import to_plain, unknown_settings
from experiments.config.rows import read_rows
from experiments.config.schema import Config
from experiments.data.load import load_data
from experiments.errors import no_such_setting
from experiments.models.model_files import model_file_versions
from experiments.provenance import code_version
from experiments.sweeps.hydra_api import (
    CompositionCache,
    Hydra,
    compose_job,
    compose_sweep,
    expand_job,
    parse_overrides,
    split_jobs,
)
from experiments.sweeps.kept_tables import KeptTable, table_of


@dataclass(frozen=True)
class SweepJob:
    """One run of a sweep.

    Attributes:
        overrides: Its overrides, those of the whole sweep included.
        name: Its table row, if it has one, and what else sets it apart from the sweep's other jobs.
        cell: Its cell, None for a benchmark.
        table: The table that its cell is a row of, if it is one.
    """

    overrides: list[str]
    name: str
    cell: Cell | None
    table: KeptTable | None = None


def is_benchmark(config: DictConfig) -> bool:
    """Return whether a configuration asks for a benchmark of this machine, which has no cell."""
    return any(OmegaConf.select(config, benchmark) is not None for benchmark in ("bench", "cost"))


def identify_cell(config: DictConfig, overrides: Sequence[str] = ()) -> Cell:
    """Return the cell of a composed configuration.

    Args:
        config: The configuration.
        overrides: The overrides that it was composed with, to refuse those that a table row would undo.

    Raises:
        ValueError, OSError, omegaconf.errors.OmegaConfBaseException: If the configuration cannot be run.
    """
    selected = select_row(config, overrides)
    typed: Config = OmegaConf.to_object(selected)  # type: ignore[assignment]
    resolved = to_plain(selected)
    data = load_data(typed.data, Path(typed.results) / "shared")
    # A model that is trained again in its folder is another cell: it must not get the old one's record or checkpoints.
    files = model_file_versions(typed)
    identity = cell_identity(resolved, " ".join([data.fingerprint, *files.values()]), code_version())
    row = None
    if config.row is not None:
        row = read_rows(config.name, OmegaConf.to_container(config.rows))[config.row].label
    return Cell(typed, resolved, files, data, identity, row)


def expand_sweep(hydra: Hydra, overrides: Sequence[str]) -> tuple[DictConfig, list[SweepJob]]:
    """Return the configuration of a sweep, and its jobs as `sweep_jobs` does."""
    sweep = compose_sweep(hydra, overrides)
    return sweep, sweep_jobs(hydra, sweep)


def sweep_jobs(hydra: Hydra, sweep: DictConfig) -> list[SweepJob]:
    """Return the jobs of a sweep, in the order in which `-m` runs them.

    A table without `row` gives all its rows, and an experiment that brings a sweep gives all jobs of that sweep.

    Args:
        hydra: Hydra, opened with the files of the sweep.
        sweep: The configuration from `compose_sweep`.

    Raises:
        ValueError, OSError, HydraException, omegaconf.errors.OmegaConfBaseException: If a configuration cannot be run.
    """
    composed: CompositionCache = {}
    jobs: list[tuple[list[str], DictConfig]] = []
    split = split_jobs(hydra, sweep)
    for job in itertools.chain.from_iterable(expand_job(hydra, sweep, job, composed) for job in split):
        config = compose_job(hydra, sweep, job, composed)
        check_settings(config)
        if config.rows and config.row is None:
            rows = [[*job, f"row={number}"] for number in range(len(config.rows))]
            jobs += [(row, compose_job(hydra, sweep, row, composed)) for row in rows]
        else:
            jobs.append((job, config))
    shared = set(jobs[0][0]).intersection(*(job for job, _ in jobs))
    expanded = []
    for job, config in jobs:
        cell = None if is_benchmark(config) else identify_cell(config, job)
        table = table_of(config, job, sweep.hydra.runtime.config_sources) if cell else None
        distinct = [override for override in job if override not in shared]
        if cell and cell.row:
            distinct = [cell.row, *(override for override in distinct if not override.startswith("row="))]
        expanded.append(SweepJob(job, ", ".join(distinct) or (cell.label if cell else config.name), cell, table))
    return expanded


def check_settings(config: DictConfig) -> None:
    """Check that a configuration has the settings of its schema, no more and no fewer.

    Raises:
        ValueError: If a setting does not exist, or if an override such as `~seed` deleted one.
    """
    for key in unknown_settings(config):
        raise ValueError(no_such_setting(key))
    for key in (field.name for field in fields(Config)):
        if key not in config.keys():  # noqa: SIM118  `key in config` is false also for what cannot be resolved yet
            raise ValueError(f"~{key}: every cell has the setting {key}; write {key}=VALUE, or leave out ~{key}")


def select_row(config: DictConfig, overrides: Sequence[str] = ()) -> DictConfig:
    """Return a configuration with the settings of its table row, and with those that its FLOPs budget chooses.

    Args:
        config: The configuration. Without `rows` and `budget.method` it is returned as it is.
        overrides: The overrides that it was composed with.

    Raises:
        ValueError: As `check_settings`; if a table has no such row or none is named; if nothing fits the budget; or if an
            override names a setting that the row or the budget sets to another value, or adds cost that the budget does
            not count.
        omegaconf.errors.OmegaConfBaseException: If a row names a setting that does not exist, or has another type.
    """
    check_settings(config)
    selected = config.copy()
    number = selected.row
    if number is None and selected.rows:
        last = len(selected.rows) - 1
        raise ValueError(
            f"row: missing; experiment {config.name} is a table with rows 0 to {last}; name one, or run all with -m"
        )
    if number is not None:
        rows = read_rows(config.name, OmegaConf.to_container(selected.rows, resolve=True))
        if not 0 <= number < len(rows):
            existing = f"has rows 0 to {len(rows) - 1}" if rows else "has no rows"
            raise ValueError(f"row: no row {number}; experiment {config.name} {existing}")
        _apply(selected, rows[number].settings, overrides, f"row {number} ('{rows[number].label}') of {config.name}")
    OmegaConf.to_container(selected, resolve=True)  # raises for an unknown interpolation, and names its setting
    OmegaConf.resolve(selected)  # settings may name ${row}
    selected.rows, selected.row = [], None
    if selected.budget.method != "none":
        from experiments.sweeps.budget import budget_settings, check_budget_alone  # imports torch, which few rows need

        check_budget_alone(selected)
        chosen = budget_settings(selected.model, **selected.budget)
        _apply(selected, chosen, overrides, f"the FLOPs budget of {config.name}")
    return selected


def _apply(config: DictConfig, settings: Mapping[str, Any], overrides: Sequence[str], source: str) -> None:
    """Set the settings of a row or a budget in place, unless an override asks for something else."""
    for override in parse_overrides(overrides):
        for key, value in settings.items():
            if _contradicts(override, config, key, value):
                raise ValueError(f"{override.input_line}: {source} sets {key}={value}; leave out one of the two")
    for key, value in settings.items():
        try:
            OmegaConf.update(config, key, value)
        except ValidationError as error:
            if not OmegaConf.is_dict(OmegaConf.select(config, key)):
                raise
            method = key in ("compressor", "reduction") and isinstance(value, str)
            advice = f"{key}.name: {value}" if method else f"{key}.SETTING: VALUE"
            raise ValueError(
                f"{key}: {source} sets {key}={value}, and {key} is a group of settings; write `{advice}`"
            ) from error


def _contradicts(override: Override, config: DictConfig, key: str, value: Any) -> bool:
    """Return whether an override asks for another value of a setting.

    A group's option (`compressor=average`) asks for its name, and for those of its settings that it changes from their
    defaults. A mapping (`compressor={size: 1}`) asks for the settings that it names.
    """
    overridden = override.key_or_group
    if overridden != key and not key.startswith(f"{overridden}."):
        return False
    requested = OmegaConf.select(config, key)
    if requested == value:
        return False
    name = key.removeprefix(f"{overridden}.")
    if isinstance(mapping := override.value(), dict):
        return OmegaConf.select(OmegaConf.create(mapping), name) is not None
    if overridden == key or name == "name":
        return True
    schema = OmegaConf.structured(OmegaConf.get_type(config, overridden))
    return requested != OmegaConf.select(schema, name)
