"""What a command line asks for: one cell or the cells of a sweep, named before anything heavy is imported."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hydra import initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from experiments import config as configuration
from experiments import rows
from experiments.data import Data, load_data
from experiments.provenance import code_version


@dataclass(frozen=True)
class Cell:
    """One configuration with one seed, and what it is known by.

    Args:
        config: The typed configuration, of the row that was asked for.
        resolved: The same as plain containers: what is hashed and recorded.
        data: The splits, of which nothing has been drawn.
        id: 16 hex digits for the configuration, the data and the code.
        row: The label of its row, where it is one of a table.
    """

    config: configuration.Config
    resolved: dict[str, Any]
    data: Data
    id: str
    row: str | None = None

    @property
    def label(self) -> str:
        """What a record is called, with its seed."""
        return _label(self.config)


def _label(config: configuration.Config) -> str:
    parts = [config.model.name]
    if config.compressor.name != "none":
        tokens = config.compressor.size**2
        parts.append(f"{tokens} token{'s' * (tokens != 1)} by {config.compressor.name}")
    if layers := config.prefusion.layers:
        inside = " inside" if config.prefusion.place == "inside" else ""
        parts.append(f"{layers} pre-fusion layer{'s' * (layers > 1)}{inside}")
    if config.reduction.name != "none":
        parts.append(_reduction_label(config.reduction))
    if config.tiles > 1:
        parts.append(f"{config.tiles} x {config.tiles} tiles")
    if config.train.steps:
        parts.append(f"{config.train.steps} steps")
    elif config.train.epochs:
        parts.append(f"{config.train.epochs} epoch{'s' * (config.train.epochs > 1)}")
    return ", ".join([*parts, f"seed {config.seed}"])


def _reduction_label(reduction: configuration.ReductionConfig) -> str:
    layers = ", ".join(map(str, reduction.layers)) + (f" of {reduction.of}" if reduction.of else "")
    keeping = "" if reduction.name == "vtw" else f" keeping {reduction.keep:.3g}"
    return f"{reduction.name}{keeping} at {layers}"


def measured(config: DictConfig) -> bool:
    """Whether a configuration asks for a measurement of this machine, which has no cell."""
    return config.bench is not None or config.cost is not None


def identify(config: DictConfig) -> Cell:
    """The cell of a composed configuration.

    Raises:
        ValueError, OSError, omegaconf.errors.OmegaConfBaseException: if the configuration is not one that can be run.
    """
    chosen = rows.choose(config)
    typed: configuration.Config = OmegaConf.to_object(chosen)  # type: ignore[assignment]
    resolved = configuration.resolved(chosen)
    data = load_data(typed.data)
    label = (
        None if config.row is None else rows.read(config.name, OmegaConf.to_container(config.rows))[config.row].label
    )
    return Cell(typed, resolved, data, configuration.identity(resolved, data.fingerprint, code_version()), label)


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


@contextmanager
def hydra() -> Iterator[Hydra]:
    """Hydra, at home in conf/."""
    with initialize_config_module("conf", job_name="run", version_base="1.3"):
        yield GlobalHydra.instance().hydra  # type: ignore[misc]


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


def _compose(
    hydra: Hydra, sweep: DictConfig, job: Sequence[str], composed: dict[tuple[str, ...], DictConfig]
) -> DictConfig:
    """A job's configuration. Those whose files are the same are read from them once and kept in `composed`: it is the
    files that take time."""
    parsed = OverridesParser.create(hydra.config_loader).parse_overrides(list(job))
    values = [
        override
        for override in parsed
        if isinstance(override.value(), dict) or not hydra.config_loader.repository.group_exists(override.key_or_group)
    ]
    files = tuple(text for text, override in zip(job, parsed, strict=True) if override not in values)
    if files not in composed:
        composed[files] = hydra.config_loader.load_sweep_config(sweep, list(files))
        with open_dict(composed[files]):
            del composed[files]["hydra"]
    config = copy.deepcopy(composed[files])
    hydra.config_loader._apply_overrides_to_config(values, config)
    return config
