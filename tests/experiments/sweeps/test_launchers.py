"""One sweep, one set of records, whoever launches the cells; a cell that fails stops no other."""

import json
import os
from dataclasses import asdict
from fractions import Fraction

import joblib
import pytest
import submitit
from hydra import compose, initialize_config_module
from joblib.externals.loky.process_executor import TerminatedWorkerError
from omegaconf import OmegaConf

from experiments.config import registry as configuration
from experiments.config.identity import identity
from experiments.config.schema import Config
from experiments.sweeps import launch
from tests.experiments.sweeps.run_sweep import finished, refused, sweep

LAUNCHERS = ["basic", "joblib", "submitit_local"]


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    """What each launcher said, and the folder that it left."""
    found = {}
    for launcher in LAUNCHERS:
        folder = tmp_path_factory.mktemp(launcher)
        found[launcher] = sweep(folder, f"hydra/launcher={launcher}"), folder
    return found


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_cell_that_fails_is_named_and_the_others_finish(sweeps, launcher):
    ended, folder = sweeps[launcher]
    assert len(finished(folder)) == 2
    refused(ended)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_cell_takes_one_thread_whoever_launches_it(sweeps, launcher):
    records = [json.loads(path.read_text()) for path in (sweeps[launcher][1] / "records").iterdir()]
    devices = {record["provenance"]["device"] for record in records if record["status"] == "finished"}
    assert devices == {"cpu (1 threads)"}


@pytest.mark.parametrize("launcher", LAUNCHERS[1:])
def test_every_launcher_gives_the_same_records(sweeps, launcher):
    expected = finished(sweeps["basic"][1])
    assert all(record["train"]["log"] for record in expected.values())
    assert finished(sweeps[launcher][1]) == expected


def test_a_launcher_that_is_not_there_ends_with_one_line_that_says_where_it_comes_from(tmp_path):
    said = one_error(sweep(tmp_path, "hydra/launcher=ray"))
    assert "Could not find 'hydra/launcher/ray'" in said
    assert said.endswith("pip install '.[sweep]'")


def test_slurm_without_slurm_ends_with_one_line(tmp_path):
    assert "srun" in one_error(sweep(tmp_path, "hydra/launcher=slurm", PATH="/nowhere"))


def one_error(ended):
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    *_, last = ended.stderr.strip().splitlines()
    assert last.startswith("error: ")
    return last


def test_slurm_grants_the_threads_that_a_cell_takes():
    configuration.register()
    with initialize_config_module("conf", version_base="1.3"):
        composed = compose("config", ["hydra/launcher=slurm", "threads=3"], return_hydra_config=True)
    assert composed.hydra.launcher.cpus_per_task == 3


def test_a_cell_takes_at_least_one_thread(composed):
    with pytest.raises(ValueError, match="threads: must be at least 1, found 0"):
        OmegaConf.to_object(composed("threads=0"))


def test_threads_are_no_part_of_a_cell():
    one, two = ({**asdict(Config()), "threads": threads} for threads in (1, 2))
    assert identity(one, "data", "code") == identity(two, "data", "code")


def test_a_worker_that_is_gone_is_a_launchers_fault():
    with pytest.raises(TerminatedWorkerError) as gone:
        joblib.Parallel(n_jobs=2)(joblib.delayed(os._exit)(9) for _ in range(2))
    assert "worker process" in launch.lost(gone.value)


def test_a_job_that_is_gone_is_a_launchers_fault_told_without_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 0)  # its result will not come late
    executor = submitit.LocalExecutor(tmp_path)
    with pytest.raises(submitit.core.utils.UncompletedJobError, match="something long") as gone:
        executor.submit(os.system, "echo something long >&2; kill -9 $PPID").result()
    said = launch.lost(gone.value)
    assert str(tmp_path) in said
    assert "something long" not in said
    assert said.endswith("the same command takes up what is missing")


def test_an_error_of_ours_is_none_of_a_launcher():
    with pytest.raises(ZeroDivisionError) as ours:
        joblib.Parallel(n_jobs=1)(joblib.delayed(Fraction)(1, 0) for _ in range(1))
    assert launch.lost(ours.value) is None
