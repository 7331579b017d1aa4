"""Run the cells of a sweep that are not finished, and report the status of all of them."""

from __future__ import annotations

import logging
import os
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from experiments.errors import one_line
from experiments.models.saved_models import check_save_folder
from experiments.records.views import failure_reason
from experiments.sweeps.distributed import is_distributed, is_main_process
from experiments.sweeps.hydra_api import (
    ConfigSource,
    compose_sweep,
    configure_logging,
    has_basic_sweeper,
    open_hydra,
    sweep_callbacks,
    sweep_launcher,
)
from experiments.sweeps.local_launcher import LocalLauncher
from experiments.sweeps.plan import SweepJob, sweep_jobs
from experiments.sweeps.runner import lacks_saved_model
from experiments.sweeps.store import CellStatus, RecordStore

log = logging.getLogger(__name__)

_LAUNCHER_PACKAGES = ("joblib", "submitit")
_LOG_MARK = "\nError stream produced"  # submitit appends the whole log of a lost job to its message


def run_sweep(
    overrides: Sequence[str], task: Callable[[DictConfig], Any], source: ConfigSource | None = None
) -> int | None:
    """Run a sweep and log the status of its cells.

    Args:
        overrides: The overrides of the command line.
        task: The function that runs one job.
        source: Where configurations come from.

    Returns:
        The exit status: 1 if a cell failed or is still missing, 0 if all are finished or run in another process. None,
        with nothing run, if the configuration has a sweeper other than Hydra's basic one: its jobs are not known before.

    Raises:
        ValueError, OSError, HydraException, omegaconf.errors.OmegaConfBaseException: Before anything is run, if a
            configuration cannot be run or the results folder cannot be written.
    """
    source = source or ConfigSource()
    with open_hydra(source) as hydra:
        sweep = compose_sweep(hydra, overrides, source.config_name)
        if not has_basic_sweeper(sweep):
            if is_distributed():
                raise ValueError(
                    f"hydra.sweeper._target_: {sweep.hydra.sweeper._target_} would search in each process by itself, found "
                    f"WORLD_SIZE={os.environ['WORLD_SIZE']}; run the search without torchrun"
                )
            return None
        jobs = sweep_jobs(hydra, sweep)
        configure_logging(sweep)
        cells = {job.cell.id: job for job in jobs if job.cell}
        _check_save_folders(jobs)
        before = cell_statuses(jobs)
        to_run = _unfinished(jobs, before)
        if cells and to_run:
            log.info("%s: %s", count_cells(len(cells)), summarise_states([status.state for status in before.values()]))
        if to_run:
            RecordStore(sweep.results).prepare()
        for job in jobs if is_main_process() else ():
            if job.cell and job.table:
                job.table.keep(job.cell.config.results)
        with sweep_callbacks(sweep, source.config_name) as callbacks:
            errors = _launch(sweep_launcher(hydra, sweep, task, callbacks), to_run) if to_run else []
        if not is_main_process():
            return 0
        configure_logging(sweep)
        after = cell_statuses(jobs)
        for identity, status in after.items():
            if note := _note(status, before[identity]):
                log.info("%s: %s", cells[identity].name, note)
        if cells:
            earlier = sum(status.state == "finished" for status in before.values())
            summary = summarise_states([status.state for status in after.values()])
            log.info("%s: %s%s", count_cells(len(cells)), summary, f" ({earlier} finished before)" if earlier else "")
        for error in errors:
            log.error("error: %s", error)
    return int(bool(errors) or any(status.state in ("failed", "missing") for status in after.values()))


def cell_statuses(jobs: Sequence[SweepJob]) -> dict[str, CellStatus]:
    """Return the status of each cell of some jobs, by identity."""
    cells = {job.cell.id: job.cell for job in jobs if job.cell}
    return {identity: RecordStore(cell.config.results).status(identity) for identity, cell in cells.items()}


def count_cells(cells: int) -> str:
    """Return "1 cell", "2 cells"."""
    return f"{cells} cell{'s' * (cells != 1)}"


def summarise_states(states: Sequence[str]) -> str:
    """Return how many cells are in each state: "1 failed, 2 finished"."""
    return ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))


def launcher_failure(error: Exception) -> str | None:
    """Return what a launcher reports of jobs that it could not start, or that it lost.

    Returns:
        The message without the jobs' logs, or None if the error is not from a launcher.
    """
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if frame.f_globals["__name__"].split(".")[0] not in _LAUNCHER_PACKAGES:
        return None
    message, has_log, _ = str(error).partition(_LOG_MARK)
    return f"{message}; its log is there too, and the same command runs what is missing" if has_log else message


def _check_save_folders(jobs: Sequence[SweepJob]) -> None:
    """Check that no two cells save their model to the same folder, and that all folders can be written.

    Raises:
        ValueError: If two cells share a folder.
        SaveError: If a folder cannot be written, or holds the model of another cell.
    """
    saving = {job.cell.id: job.cell.config.save for job in jobs if job.cell and job.cell.config.save}
    for folder, cells in Counter(saving.values()).items():
        if cells > 1:
            raise ValueError(
                f"save: {cells} cells would be saved to '{folder}'; give each a folder of its own, as "
                f"'save={folder}/${{seed}}'"
            )
    for identity, folder in saving.items():
        check_save_folder(Path(folder), identity)


def _unfinished(jobs: Sequence[SweepJob], statuses: Mapping[str, CellStatus]) -> list[SweepJob]:
    """Return the jobs to launch.

    Processes that train together launch every job: one of them may not yet see a record that another has read.
    """
    to_run: dict[str, SweepJob] = {}
    for number, job in enumerate(jobs):
        if job.cell is None:
            to_run[str(number)] = job
            continue
        state = statuses[job.cell.id].state
        unsaved = state == "finished" and lacks_saved_model(job.cell)
        if state == "finished" and not unsaved:
            RecordStore(job.cell.config.results).clean(job.cell.id)
        if (
            unsaved
            or is_distributed()
            or state in ("missing", "running")
            or (state == "failed" and job.cell.config.retry_failed)
        ):
            to_run.setdefault(job.cell.id, job)
    return list(to_run.values())


def _launch(launcher: Launcher, jobs: Sequence[SweepJob]) -> list[str]:
    """Launch jobs, and return the errors that no record holds."""
    if isinstance(launcher, LocalLauncher):
        launcher.planned = {tuple(job.overrides): job for job in jobs}
    try:
        returned = launcher.launch([job.overrides for job in jobs], initial_job_idx=0)
    except Exception as error:
        reason = launcher_failure(error)
        if reason is None:
            raise
        return [one_line(reason)]  # other jobs may have finished
    failed = [job for job in returned if job.status == JobStatus.FAILED]
    return [f"{' '.join(job.overrides or ())}: {one_line(job._return_value)}" for job in failed]


def _note(status: CellStatus, before: CellStatus) -> str:
    if status.state == "failed":
        assert status.record
        reason = failure_reason(status.record)
        return f"failed before, not run again (--retry-failed runs it): {reason}" if status == before else reason
    if status.state == "running":
        return f"run by {status.owner}"
    return "ended without a record" if status.state == "missing" else ""
