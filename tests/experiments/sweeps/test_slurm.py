"""A sweep through a real SLURM: run by `make test-slurm`."""

import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from getpass import getuser

import pytest

from tests.experiments.sweeps import slurm_cluster
from tests.experiments.sweeps.run_sweep import finished, refused, sweep

absent = slurm_cluster.missing()
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(absent), reason=f"no {', '.join(absent)} here: as root, make test-slurm installs them"),
]


def test_slurm_gives_the_records_of_a_local_sweep(tmp_path):
    seeds = "seed=0,1"
    local = sweep(tmp_path / "local", seeds)
    refused(local)
    with slurm_cluster.cluster() as environment:
        ended = sweep(tmp_path / "slurm", seeds, "hydra/launcher=submitit_slurm", **environment)
    refused(ended)
    assert len(finished(tmp_path / "slurm")) == 4
    assert finished(tmp_path / "slurm") == finished(tmp_path / "local")


def test_a_cell_that_slurm_takes_the_node_from_goes_on_where_it_was(tmp_path):
    """SLURM's warning ahead of a time limit or of a more urgent job is SIGUSR2 (submitit asks for it)."""
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    one = ["train.batch_size=2", "train.steps=20", "train.save_every=10"]
    with slurm_cluster.cluster() as environment, ThreadPoolExecutor() as pool:
        sweeping = pool.submit(sweep, cut, *one, "hydra/launcher=slurm", **environment)
        until(lambda: list(cut.glob("work/*/checkpoint-10/trainer_state.json")))
        command = partial(subprocess.run, env=os.environ | environment, check=True)
        command(["scancel", "--signal=USR2", f"--user={getuser()}"])
        until(lambda: log(cut, "out").count("Requeued job"))
        command(["scontrol", "update", "jobid=1", "starttime=now"])  # SLURM would wait two minutes
        assert sweeping.result().returncode == 0
    assert "resuming from" in log(cut, "err")
    assert sweep(whole, *one).returncode == 0
    assert finished(cut) == finished(whole)


def log(results, stream):
    return "".join(path.read_text() for path in results.glob(f"sweep/.submitit/*/*_log.{stream}"))


def until(true):
    deadline = time.monotonic() + 300
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)
