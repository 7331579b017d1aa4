"""Hydra launcher `local`: run the jobs of a sweep on all cores or all GPUs of this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, configure_log

from experiments.errors import MissingDeviceError
from experiments.sweeps.distributed import is_distributed
from experiments.sweeps.hydra_api import BasicLauncher
from experiments.sweeps.memory import available_memory, worker_memory
from experiments.sweeps.plan import SweepJob, is_benchmark
from experiments.sweeps.worker import JobRunner
from experiments.sweeps.worker_display import WorkerDisplay
from experiments.sweeps.worker_limits import Machine, WorkerPlan, plan_workers, visible_gpus
from experiments.sweeps.worker_pool import LocalJob, run_in_workers

log = logging.getLogger(__name__)


class LocalLauncher(BasicLauncher):
    """Runs jobs in one process for each core or each GPU. A single worker is this process itself.

    Benchmarks measure time, and processes that train one cell together share its work, so both run one job at a time.

    Args:
        workers: How many processes to start; None for as many as cores, GPUs and memory allow.

    Attributes:
        planned: The sweep's jobs by their overrides, where they are known before.
    """

    def __init__(self, workers: int | None = None) -> None:
        super().__init__()
        if workers is not None and workers < 1:
            raise ValueError(f"hydra.launcher.workers: must be at least 1, found {workers}")
        self.workers = workers
        self.planned: Mapping[tuple[str, ...], SweepJob] = {}

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run jobs, and return what Hydra returns of each.

        Raises:
            SystemExit: If a job ends the program, because no other job can run either.
        """
        assert self.config is not None
        assert self.hydra_context is not None
        assert self.task_function is not None
        configs = [self._config(overrides) for overrides in job_overrides]
        if len(configs) < 2 or is_distributed() or any(map(self._is_benchmark, job_overrides)):
            return super().launch(job_overrides, initial_job_idx)
        plan = _plan(configs, self.workers)
        if len(plan.environments) < 2:
            log.info("one worker: %s", plan.reason)
            return super().launch(job_overrides, initial_job_idx)
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        log.info("%d jobs in %d workers (%s)", len(configs), len(plan.environments), plan.reason)
        jobs = [
            LocalJob(initial_job_idx + number, overrides, self._name(overrides), _shared(config))
            for number, (overrides, config) in enumerate(zip(job_overrides, configs, strict=True))
        ]
        runner = JobRunner(self.hydra_context, self.config, self.task_function, Singleton.get_state())
        return run_in_workers(jobs, runner, plan.environments, WorkerDisplay(len(jobs)))

    def _config(self, overrides: Sequence[str]) -> Any:
        """Return a job's configuration, or that of the sweep if the job was not known before."""
        job = self.planned.get(tuple(overrides))
        return job.cell.config if job and job.cell else self.config

    def _is_benchmark(self, overrides: Sequence[str]) -> bool:
        job = self.planned.get(tuple(overrides))
        return job.cell is None if job else is_benchmark(self.config)

    def _name(self, overrides: Sequence[str]) -> str:
        job = self.planned.get(tuple(overrides))
        return job.name if job else " ".join(overrides)


def _plan(configs: Sequence[Any], workers: int | None) -> WorkerPlan:
    from joblib import cpu_count  # respects affinity and the limits of containers

    devices = {config.device for config in configs}
    device, gpus = _cell_device(devices.pop()) if len(devices) == 1 else (" and ".join(sorted(devices)), [])
    machine = Machine(cpu_count(), available_memory(), device, gpus)
    threads = max(config.threads for config in configs)
    return plan_workers(len(configs), machine, threads, max(map(worker_memory, configs)), workers)


def _cell_device(name: str) -> tuple[str, list[str]]:
    """Return the device that a cell uses for a value of `device`, and the GPUs that this process sees."""
    if name == "cpu":
        return name, []
    import torch

    from experiments.devices import select_device

    try:
        device = str(select_device(name))
    except MissingDeviceError:
        return name, []  # the cells report it
    return device, visible_gpus(torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def _shared(config: Any) -> str:
    """Identify the base model and the data of a cell. A joined model has a projector initialised from the seed."""
    joined_seed = config.seed if hasattr(config.model, "vision") else None
    return repr([config.model, config.data, joined_seed])
