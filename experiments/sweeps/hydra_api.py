"""Everything that sweeps use of Hydra beyond its public interface; written for hydra-core 1.3.

Hydra's own sweeper composes every job from its files and runs them all. A sweep here must know each job's configuration
first, to leave out finished cells.
"""

from __future__ import annotations

import argparse
import copy
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import configure_log
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from experiments.provenance import ROOT

__all__ = [
    "BASIC_SWEEPER",
    "CONF",
    "BasicLauncher",
    "Callbacks",
    "CompositionCache",
    "ConfigSource",
    "Hydra",
    "compose_job",
    "compose_sweep",
    "configure_logging",
    "expand_job",
    "flags_first",
    "has_basic_sweeper",
    "list_groups_without_copies",
    "open_hydra",
    "parse_command_line",
    "parse_overrides",
    "split_jobs",
    "sweep_callbacks",
    "sweep_launcher",
]

CONF = str(ROOT / "conf")
"""Our configuration folder, by its path: a project may have a package `conf` of its own."""
BASIC_SWEEPER = f"{BasicSweeper.__module__}.{BasicSweeper.__name__}"
CompositionCache = dict[tuple[str, ...], tuple[DictConfig, dict[str, Any]]]
"""Compositions of one sweep and the sweeps that their experiments bring, by the overrides that select files."""
_SETS_BENCHMARK = {"bench": "experiment=bench_probe", "cost": "experiment=cost"}


@dataclass(frozen=True)
class ConfigSource:
    """Where configurations come from: Hydra's flags --config-name, --config-path and --config-dir."""

    config_name: str = "config"
    config_path: str = CONF
    config_dir: str | None = None

    @classmethod
    def from_flags(cls, arguments: argparse.Namespace) -> ConfigSource:
        """Return the source that a command line names."""
        path = CONF if arguments.config_path is None else os.path.abspath(arguments.config_path)
        return cls(arguments.config_name or "config", path, arguments.config_dir)


def parse_command_line(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return Hydra's own flags and the overrides of a command line, in any order.

    Args:
        arguments: The words of the command line, by default those of this program.
    """
    return get_args_parser().parse_intermixed_args(arguments)


def flags_first(arguments: Sequence[str]) -> list[str]:
    """Return a command line with its overrides behind all flags, as Hydra's own parser needs them."""
    overrides = list(parse_command_line(arguments).overrides)
    flags = list(arguments)
    for override in overrides:
        flags.remove(override)
    return [*flags, *overrides]


@contextmanager
def open_hydra(source: ConfigSource | None = None) -> Iterator[Hydra]:
    """Initialise Hydra with the files of a source, by default those in conf/, inside the block.

    Raises:
        ValueError: If --config-dir names no folder.
    """
    source = source or ConfigSource()
    search_path = create_config_search_path(source.config_path)
    if source.config_dir is not None:
        if not os.path.isdir(source.config_dir):
            raise ValueError(f"--config-dir: no folder '{source.config_dir}'")
        # before the schema, which Hydra wants last
        search_path.prepend("command-line", f"file://{os.path.abspath(source.config_dir)}", anchor="schema")
    version.setbase("1.3")
    GlobalHydra.instance().clear()
    try:
        yield Hydra.create_main_hydra2("run", search_path)
    finally:
        GlobalHydra.instance().clear()


@contextmanager
def list_groups_without_copies() -> Iterator[None]:
    """Let --help list the option groups without a copy of all sources for each of them.

    Hydra copies its sources, the whole schema among them, before each of about 90 listings, so that overrides can change
    the search path. --help lists groups without overrides. The copies took three quarters of its time.
    """
    original = ConfigLoaderImpl.get_group_options

    def get_group_options(
        self: ConfigLoaderImpl, group_name: str, results_filter: Any = ObjectType.CONFIG, *others: Any, **more: Any
    ) -> list[str]:
        if others or more:
            return original(self, group_name, results_filter, *others, **more)
        return self.repository.get_group_options(group_name, results_filter)

    ConfigLoaderImpl.get_group_options = get_group_options  # type: ignore[method-assign]
    try:
        yield
    finally:
        ConfigLoaderImpl.get_group_options = original  # type: ignore[method-assign]


@contextmanager
def name_failing_override() -> Iterator[None]:
    """Name the override that failed, where Hydra 1.3 and OmegaConf 2.3 fail on it without its name.

    Raises:
        ValueError: For an override inside a setting that is null (`cost.text=9` without experiment=cost), and for one of
            an option group that names no option (`train=null`).
    """
    try:
        yield
    except (AssertionError, AttributeError, ValueError) as error:
        variables = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
        applying = [local for local in variables if isinstance(local.get("override"), Override)]
        if not applying or isinstance(error, (HydraException, OmegaConfBaseException)):
            raise  # not from an override, or with its name
        override, config = applying[-1]["override"], applying[-1].get("cfg")
        if reason := _null_setting(override, config) if config is not None else _no_option(override):
            raise ValueError(f"{override.input_line}: {reason}") from error
        raise


def _null_setting(override: Override, config: DictConfig) -> str | None:
    """Return the reason why nothing in a setting can be set, if that is because the setting is null."""
    parts = override.key_or_group.split(".")
    for length in range(1, len(parts) + 1):
        key = ".".join(parts[:length])
        if OmegaConf.select(config, key) is None:
            advice = f"add {_SETS_BENCHMARK[key]}" if key in _SETS_BENCHMARK else f"set {key} in a configuration file"
            return f"{key} is null, so nothing in it can be set; {advice}"
    return None


def _no_option(override: Override) -> str | None:
    """Return the reason why a value names no option of a group, if that is so."""
    if isinstance(override.value(), (str, list)):
        return None
    key = override.key_or_group
    return f"{key} is a group of options; name one, as {key}=OPTION, or leave it out" if key else "write KEY=VALUE"


@name_failing_override()
def compose_sweep(hydra: Hydra, overrides: Sequence[str], config_name: str = "config") -> DictConfig:
    """Return the configuration of a sweep, which no job has changed yet.

    Raises:
        ValueError, HydraException, omegaconf.errors.OmegaConfBaseException: If the overrides are wrong.
    """
    multirun = [] if "hydra.mode=MULTIRUN" in overrides else ["hydra.mode=MULTIRUN"]
    return hydra.compose_config(config_name, [*overrides, *multirun], RunMode.MULTIRUN)


def has_basic_sweeper(sweep: DictConfig) -> bool:
    """Return whether a sweep's jobs are those of Hydra's basic sweeper, which runs a grid."""
    return sweep.hydra.sweeper._target_ == BASIC_SWEEPER


def split_jobs(hydra: Hydra, sweep: DictConfig) -> list[list[str]]:
    """Return the overrides of each job, in the order of Hydra's basic sweeper.

    Raises:
        ValueError: If a sweep has no values: `seed=range(0,0)`.
    """
    # not resolved: `data.seed=${seed}` has another value in each job
    given = OmegaConf.to_container(sweep.hydra.sweeper, resolve=False).get("params") or {}  # type: ignore[union-attr]
    params = [f"{key}={value}" for key, value in given.items()]
    task: Any = OmegaConf.to_container(sweep.hydra.overrides.task, resolve=False)
    parsed = OverridesParser.create(hydra.config_loader).parse_overrides([*params, *task])
    for override in parsed:
        if "${hydra:" in str(override.input_line) and not override.key_or_group.startswith("hydra."):
            raise ValueError(
                f"{override.input_line}: a cell must not depend on Hydra's own settings, which change from run to run; "
                "refer to another setting, as ${seed}"
            )
    (jobs,) = BasicSweeper.split_arguments(parsed, None)
    if not jobs:
        empty = [override.input_line for override in parsed if override.is_sweep_override()]
        raise ValueError(f"{empty[0]}: an empty sweep; give it a value")
    return jobs


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Return overrides by key and value.

    Raises:
        HydraException: If one is not in Hydra's grammar.
    """
    return OverridesParser.create().parse_overrides(list(overrides))


@name_failing_override()
def compose_job(hydra: Hydra, sweep: DictConfig, job: Sequence[str], composed: CompositionCache) -> DictConfig:
    """Return one job's configuration.

    Args:
        sweep: The configuration of the sweep.
        job: The job's overrides.
        composed: The cache, which this fills.
    """
    loaded, _, values = _load_files(hydra, sweep, job, composed)
    config = copy.deepcopy(loaded)
    hydra.config_loader._apply_overrides_to_config(values, config)
    return config


def expand_job(hydra: Hydra, sweep: DictConfig, job: Sequence[str], composed: CompositionCache) -> list[list[str]]:
    """Return the jobs that a job stands for: those of its experiment's own sweep, if the sweep has several experiments.

    Args:
        sweep: The configuration of the sweep.
        job: The job's overrides.
        composed: The cache, which this fills.
    """
    _, own_sweep, _ = _load_files(hydra, sweep, job, composed)
    given = {"row", *(override.key_or_group for override in parse_overrides(job))}  # rows are numbered in plan.py
    if not (left_out := [f"{key}={value}" for key, value in own_sweep.items() if key not in given]):
        return [list(job)]
    parsed = OverridesParser.create(hydra.config_loader).parse_overrides(left_out)
    (jobs,) = BasicSweeper.split_arguments(parsed, None)
    return [[*own, *job] for own in jobs]


def _load_files(
    hydra: Hydra, sweep: DictConfig, job: Sequence[str], composed: CompositionCache
) -> tuple[DictConfig, dict[str, Any], list[Override]]:
    """Return what a job's files give, the sweep that they bring, and the job's overrides that select no file.

    Reading YAML files dominates the cost (2.2 s against 0.06 s), so jobs that select the same files share one
    composition.
    """
    parsed = OverridesParser.create(hydra.config_loader).parse_overrides(list(job))
    values = [
        override
        for override in parsed
        if isinstance(override.value(), dict) or not hydra.config_loader.repository.group_exists(override.key_or_group)
    ]
    files = tuple(text for text, override in zip(job, parsed, strict=True) if override not in values)
    if files not in composed:
        loaded = hydra.config_loader.load_sweep_config(sweep, list(files))
        own_sweep: Any = OmegaConf.to_container(loaded.hydra.sweeper, resolve=False).get("params") or {}  # type: ignore[union-attr]
        with open_dict(loaded):
            del loaded["hydra"]
        composed[files] = loaded, own_sweep
    return *composed[files], values


@contextmanager
def sweep_callbacks(sweep: DictConfig, config_name: str) -> Iterator[Callbacks]:
    """Call `on_multirun_start` and `on_multirun_end` of `hydra.callbacks` around the block, as Hydra does.

    Like Hydra's, the second is left out after an exception.

    Args:
        sweep: The configuration of the sweep.
        config_name: The name that --config-name gives.
    """
    callbacks = Callbacks(sweep)
    callbacks.on_multirun_start(config=sweep, config_name=config_name)
    yield callbacks
    callbacks.on_multirun_end(config=sweep, config_name=config_name)


def sweep_launcher(
    hydra: Hydra, sweep: DictConfig, task: Callable[[DictConfig], Any], callbacks: Callbacks
) -> Launcher:
    """Return the sweep's launcher.

    Args:
        task: The function that runs one job. Launchers pickle it, so it must be importable by name.
        callbacks: Those of `sweep_callbacks`, which the launcher calls around each job.
    """
    context = HydraContext(hydra.config_loader, callbacks)
    return Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=sweep)


def configure_logging(sweep: DictConfig) -> None:
    """Set up logging as the configuration says. Launchers set up their own, so call this again after them."""
    if OmegaConf.is_missing(sweep.hydra.runtime, "output_dir"):  # a log file of the sweep lies in the sweep's folder
        with open_dict(sweep):
            sweep.hydra.runtime.output_dir = sweep.hydra.sweep.dir
        if "FileHandler" in OmegaConf.to_yaml(sweep.hydra.job_logging, resolve=False):
            os.makedirs(sweep.hydra.sweep.dir, exist_ok=True)
    configure_log(sweep.hydra.job_logging)
