"""The cells of a sweep: those that are done are left out, the rest go to Hydra's launcher, and at the end it is said how
all of them stand."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping, Sequence

from hydra._internal.callbacks import Callbacks
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, configure_log
from hydra.types import HydraContext
from omegaconf import DictConfig

from experiments.errors import one_line
from experiments.records.views import failure
from experiments.sweeps import hydra_api, plan
from experiments.sweeps.distributed import first, together
from experiments.sweeps.plan import Job
from experiments.sweeps.store import Standing, Store

log = logging.getLogger(__name__)


def sweep(overrides: Sequence[str], job: Callable[[DictConfig], None]) -> int:
    """Run what a sweep asks for and say how it stands.

    Returns:
        The exit status: 1 if a cell failed or is still missing, 0 if all are finished or another process runs them.

    Raises:
        ValueError, OSError, HydraException, omegaconf.errors.OmegaConfBaseException: if a configuration is not one that can
            be run, or the results folder cannot be written, before anything is run.
    """
    with hydra_api.hydra() as hydra:
        config, jobs = plan.expand(hydra, overrides)
        configure_log(config.hydra.job_logging)
        cells = {job.cell.id: job for job in jobs if job.cell}
        before = standings(jobs)
        to_run = _to_run(jobs, before)
        if cells and to_run:
            log.info("%s: %s", count(len(cells)), states([standing.state for standing in before.values()]))
        if to_run:
            Store(config.results).prepare()
        context = HydraContext(hydra.config_loader, Callbacks(config))
        broken = _launch(config, context, to_run, job) if to_run else []
        if not first():
            return 0
        configure_log(config.hydra.job_logging)  # launchers leave their own
        after = standings(jobs)
        for name, standing in after.items():
            if told := _told(standing):
                log.info("%s: %s", cells[name].name, told)
        if cells:
            earlier = sum(standing.state == "finished" for standing in before.values())
            text = states([standing.state for standing in after.values()])
            log.info("%s: %s%s", count(len(cells)), text, f" ({earlier} finished before)" if earlier else "")
        for error in broken:
            log.error("error: %s", error)
    return int(bool(broken) or any(standing.state in ("failed", "missing") for standing in after.values()))


def standings(jobs: Sequence[Job]) -> dict[str, Standing]:
    """How each cell stands, by its identity."""
    cells = {job.cell.id: job.cell for job in jobs if job.cell}
    return {name: Store(cell.config.results).standing(name) for name, cell in cells.items()}


def _to_run(jobs: Sequence[Job], before: Mapping[str, Standing]) -> list[list[str]]:
    """The overrides of those jobs that a launcher is given. Several processes that train together are given all: what
    one of them sees done another may not yet."""
    found: dict[str, list[str]] = {}
    for number, each in enumerate(jobs):
        if each.cell is None:
            found[str(number)] = each.overrides
            continue
        state = before[each.cell.id].state
        if state == "finished":
            Store(each.cell.config.results).clean(each.cell.id)
        if together() or state in ("missing", "running") or (state == "failed" and each.cell.config.retry_failed):
            found.setdefault(each.cell.id, each.overrides)
    return list(found.values())


def _launch(
    config: DictConfig, context: HydraContext, overrides: Sequence[Sequence[str]], job: Callable[[DictConfig], None]
) -> list[str]:
    """What went wrong that no record tells of."""
    launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=job, config=config)
    try:
        returned: Sequence[JobReturn] = launcher.launch(overrides, initial_job_idx=0)
    except Exception as error:
        reason = lost(error)
        if reason is None:
            raise
        return [one_line(reason)]  # the other jobs may have ended well
    broken = [one for one in returned if one.status == JobStatus.FAILED]
    return [f"{' '.join(one.overrides or ())}: {one_line(one._return_value)}" for one in broken]


def _told(standing: Standing) -> str:
    if standing.state == "failed":
        assert standing.record
        return failure(standing.record)
    if standing.state == "running":
        return f"run by {standing.owner}"
    return "ended without a record" if standing.state == "missing" else ""


def count(cells: int) -> str:
    return f"{cells} cell{'s' * (cells != 1)}"


def states(found: Sequence[str]) -> str:
    """How many cells are in each state."""
    return ", ".join(f"{found.count(state)} {state}" for state in sorted(set(found)))


_PACKAGES = ("joblib", "submitit")


_LOG = "\nError stream produced"  # submitit appends the whole log of a job that is gone


def lost(error: Exception) -> str | None:
    """What a launcher says of jobs that it could not start, or that ended without a word. None where the error is not
    a launcher's."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if frame.f_globals["__name__"].split(".")[0] not in _PACKAGES:
        return None
    said, log, _ = str(error).partition(_LOG)
    return said + "; its log lies there too, and the same command takes up what is missing" if log else said
