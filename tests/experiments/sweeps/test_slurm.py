"""A sweep through a real SLURM: run by `make test-slurm`."""

import os
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from getpass import getuser
from pathlib import Path

import pytest

from tests.experiments.sweeps import slurm_cluster
from tests.experiments.sweeps.run_sweep import assert_failed_cells_are_named, finished_records, run_training_sweep

missing = slurm_cluster.missing_commands()
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)} here: as root, make test-slurm installs them"),
]


def test_sweep_through_slurm_gives_the_records_of_a_local_sweep(tmp_path):
    seeds = "seed=0,1"
    local = run_training_sweep(tmp_path / "local", seeds)
    assert_failed_cells_are_named(local)
    with slurm_cluster.cluster() as environment:
        ended = run_training_sweep(tmp_path / "slurm", seeds, "hydra/launcher=submitit_slurm", **environment)
    assert_failed_cells_are_named(ended)
    assert len(finished_records(tmp_path / "slurm")) == 4
    assert finished_records(tmp_path / "slurm") == finished_records(tmp_path / "local")


def test_cell_that_slurm_preempts_resumes_from_its_checkpoint(tmp_path):
    """SLURM sends SIGUSR2 before a time limit or a preemption, because submitit asks for it."""
    preempted, uninterrupted = tmp_path / "preempted", tmp_path / "uninterrupted"
    cell = ["train.batch_size=2", "train.max_steps=20", "train.save_steps=10"]
    with slurm_cluster.cluster() as environment, ThreadPoolExecutor() as pool:
        sweep = pool.submit(run_training_sweep, preempted, *cell, "hydra/launcher=slurm", **environment)
        wait_for(lambda: list(preempted.glob("work/*/checkpoint-10/trainer_state.json")))
        command = partial(subprocess.run, env=os.environ | environment, check=True, capture_output=True)
        command(["scancel", "--signal=USR2", f"--user={getuser()}"])
        wait_for(lambda: job_log(preempted, "out").count("Requeued job"))
        wait_for(lambda: command(["squeue", "--noheader", "--states=PENDING"]).stdout)
        command(["scontrol", "update", "jobid=1", "starttime=now"])  # SLURM would wait two minutes
        assert sweep.result().returncode == 0
    assert "resuming from" in job_log(preempted, "err")
    assert run_training_sweep(uninterrupted, *cell).returncode == 0
    assert finished_records(preempted) == finished_records(uninterrupted)


def job_log(results: Path, stream: str) -> str:
    """Return what the jobs of a sweep printed.

    Args:
        results: The results folder.
        stream: "out" or "err".
    """
    return "".join(path.read_text() for path in results.glob(f"sweep/.submitit/*/*_log.{stream}"))


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until a condition is true, at most five minutes."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
