"""Everything that sweeps use of Hydra beyond its public interface; written for hydra-core 1.3.

Hydra's own sweeper composes every job from its files and runs them all. A sweep here must know each job's configuration
first, to leave out finished cells.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra import initialize_config_module
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, configure_log
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict


def parse_command_line() -> argparse.Namespace:
    """Return Hydra's own flags and the overrides of this program's command line."""
    return get_args_parser().parse_args()


@contextmanager
def open_hydra() -> Iterator[Hydra]:
    """Initialise Hydra with the files in conf/, inside the block."""
    with initialize_config_module("conf", job_name="run", version_base="1.3"):
        yield GlobalHydra.instance().hydra  # type: ignore[misc]


def compose_sweep(hydra: Hydra, overrides: Sequence[str]) -> DictConfig:
    """Return the configuration of a sweep, which no job has changed yet.

    Raises:
        HydraException, omegaconf.errors.OmegaConfBaseException: If the overrides are wrong.
    """
    return hydra.compose_config("config", [*overrides, "hydra.mode=MULTIRUN"], RunMode.MULTIRUN)


def split_jobs(hydra: Hydra, sweep: DictConfig) -> list[list[str]]:
    """Return the overrides of each job, in the order of Hydra's basic sweeper."""
    # not resolved: `data.seed=${seed}` has another value in each job
    given = OmegaConf.to_container(sweep.hydra.sweeper, resolve=False).get("params") or {}  # type: ignore[union-attr]
    params = [f"{key}={value}" for key, value in given.items()]
    task: Any = OmegaConf.to_container(sweep.hydra.overrides.task, resolve=False)
    parsed = OverridesParser.create(hydra.config_loader).parse_overrides([*params, *task])
    (jobs,) = BasicSweeper.split_arguments(parsed, None)
    return jobs


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Return overrides by key and value.

    Raises:
        HydraException: If one is not in Hydra's grammar.
    """
    return OverridesParser.create().parse_overrides(list(overrides))


def compose_job(
    hydra: Hydra, sweep: DictConfig, job: Sequence[str], composed: dict[tuple[str, ...], DictConfig]
) -> DictConfig:
    """Return one job's configuration.

    Reading YAML files dominates the cost (2.2 s against 0.06 s), so jobs that select the same files share one
    composition.

    Args:
        sweep: The configuration of the sweep.
        job: The job's overrides.
        composed: The cache: compositions by the overrides that select files.
    """
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


def launch_jobs(
    hydra: Hydra, sweep: DictConfig, task: Callable[[DictConfig], None], jobs: Sequence[Sequence[str]]
) -> Sequence[JobReturn]:
    """Run jobs with the sweep's launcher.

    Args:
        task: The function that runs one job. Launchers pickle it, so it must be importable by name.
        jobs: The overrides of each job.
    """
    context = HydraContext(hydra.config_loader, Callbacks(sweep))
    launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=sweep)
    return launcher.launch(jobs, initial_job_idx=0)


def configure_logging(sweep: DictConfig) -> None:
    """Set up logging as the configuration says. Launchers set up their own, so call this again after them."""
    configure_log(sweep.hydra.job_logging)
