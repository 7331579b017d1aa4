"""The function that Hydra calls for one job: a cell or a benchmark."""

from __future__ import annotations

import logging
import os
import sys
import time

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments.cell import Cell
from experiments.config.plain import to_plain
from experiments.config.rows import register_resolvers
from experiments.config.schema import Config
from experiments.errors import INPUT_ERRORS, UnfinishedCellError, exit_with_error, full_error_requested
from experiments.records.views import parse_outcomes
from experiments.sweeps.distributed import is_main_process
from experiments.sweeps.hydra_api import BASIC_SWEEPER
from experiments.sweeps.kept_tables import table_of
from experiments.sweeps.plan import identify_cell, is_benchmark, select_row
from experiments.sweeps.runner import run_if_needed
from experiments.sweeps.store import CellStatus, RecordStore, ResultsFolderError

log = logging.getLogger(__name__)


def run_job(config: DictConfig) -> float | None:
    """Run one Hydra job.

    Outside a sweep, exit with a one-line error if the configuration is invalid or the cell failed. Inside a sweep, raise,
    so that the next job runs, unless the results folder cannot be written.

    Args:
        config: The composed configuration.

    Returns:
        The accuracy of a finished cell, from 0 to 1, for sweepers that search. None for anything else.
    """
    register_resolvers()  # launchers call this in processes of their own
    hydra = HydraConfig.get()
    os.chdir(hydra.runtime.cwd)  # with hydra.job.chdir, relative paths still mean the folder of the command
    sweeping = hydra.mode == RunMode.MULTIRUN
    try:
        if is_benchmark(config):
            _run_benchmark(config, hydra.overrides.task)
        else:
            cell = identify_cell(config, hydra.overrides.task)
            table = None if sweeping else table_of(config, hydra.overrides.task, hydra.runtime.config_sources)
            if table and is_main_process():
                table.keep(cell.config.results)
            status = run_if_needed(cell, record_input_errors=sweeping)
            searching = sweeping and hydra.sweeper._target_ != BASIC_SWEEPER
            while searching and status.state == "running":
                time.sleep(1)  # a search needs the accuracy, and may try the same cell twice at once
                status = run_if_needed(cell, record_input_errors=True)
            if is_main_process() and not sweeping:
                _report(cell, status)
            if status.state == "finished" and status.record:
                if status.record.get("benchmarks"):
                    _check_not_searching(searching)
                    return None
                return float(parse_outcomes(status.record["accuracy"]["image"]).mean())
            if searching:
                raise UnfinishedCellError(_unfinished_reason(cell, status))
    except INPUT_ERRORS as error:
        if sweeping and not isinstance(error, ResultsFolderError):
            raise
        exit_with_error(error)  # here and not in main: Hydra would add a line of its own
    return None


def _check_not_searching(searching: bool) -> None:
    """Refuse to search by benchmarks, whose scores have no common unit."""
    if searching:
        raise ValueError("hydra/sweeper: benchmarks have no accuracy to search by; run a grid of the settings instead")


def _run_benchmark(config: DictConfig, overrides: list[str]) -> None:
    from experiments.benchmarks.model_cost.run import run_cost_benchmark
    from experiments.benchmarks.probe_overhead import run_overhead_benchmark

    config = select_row(config, overrides)
    typed: Config = OmegaConf.to_object(config)  # type: ignore[assignment]
    for settings, run in ((typed.bench, run_overhead_benchmark), (typed.cost, run_cost_benchmark)):
        if settings is not None:
            log.info("\n".join(map(str, run(typed, to_plain(config)))))


def _report(cell: Cell, status: CellStatus) -> None:
    """Log the record and the figures of a finished cell, or exit with the reason why there is none."""
    if status.state != "finished":
        if status.state == "failed" and status.record and full_error_requested:
            print(status.record["traceback"], file=sys.stderr)
        exit_with_error(_unfinished_reason(cell, status))
    from experiments.report.figures.record import draw_record

    path = RecordStore(cell.config.results).path(cell.id)
    log.info("record %s%s", path, "".join(f"\nfigure {figure}" for figure in draw_record(path)))


def _unfinished_reason(cell: Cell, status: CellStatus) -> str:
    """Return in one line why a cell is not finished."""
    if status.state == "running":
        return f"{cell.label} is being run by {status.owner or 'another process'}"
    assert status.record
    path = RecordStore(cell.config.results).path(cell.id)
    return f"{cell.label} failed: {status.record['error']} (traceback in {path}; --retry-failed runs it again)"
