"""One sweep under each launcher: the same records, and a cell that fails stops no other."""

import json
import os
from fractions import Fraction
from functools import cache

import joblib
import pytest
import submitit
from hydra import compose, initialize_config_module
from joblib.externals.loky.process_executor import TerminatedWorkerError
from omegaconf import OmegaConf

from experiments.config.registry import register_configs
from experiments.sweeps.launch import launcher_failure
from tests.experiments.sweeps.run_sweep import assert_failed_cells_are_named, finished_records, run_training_sweep

SETTINGS = {"basic": (), "local": ("hydra.launcher.workers=2",), "joblib": (), "submitit_local": ()}
# The launchers that are packages of others start a Python for each cell, which takes a minute.
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("joblib", "submitit_local")]


@pytest.fixture(scope="module")
def sweep_of(tmp_path_factory):
    """A function from a launcher to the ended process and the results folder of its sweep, which runs once."""

    @cache
    def run(launcher):
        folder = tmp_path_factory.mktemp(launcher)
        return run_training_sweep(folder, f"hydra/launcher={launcher}", *SETTINGS[launcher]), folder

    return run


@pytest.mark.parametrize("launcher", ["basic", "local", *OTHERS])
def test_sweep_with_failing_cell_names_it_and_finishes_the_others(sweep_of, launcher):
    ended, folder = sweep_of(launcher)
    assert len(finished_records(folder)) == 2
    assert_failed_cells_are_named(ended)


@pytest.mark.parametrize("launcher", ["basic", "local", *OTHERS])
def test_sweep_under_any_launcher_runs_each_cell_in_one_thread(sweep_of, launcher):
    records = [json.loads(path.read_text()) for path in (sweep_of(launcher)[1] / "records").iterdir()]
    devices = {record["provenance"]["device"] for record in records if record["status"] == "finished"}
    assert devices == {"cpu (1 threads)"}


@pytest.mark.parametrize("launcher", ["local", *OTHERS])
def test_sweep_under_any_launcher_gives_equal_records(sweep_of, launcher):
    expected = finished_records(sweep_of("basic")[1])
    assert all(record["train"]["log"] for record in expected.values())
    assert finished_records(sweep_of(launcher)[1]) == expected


def test_sweep_with_launcher_that_is_not_installed_ends_with_one_line_and_pip_command(tmp_path):
    line = error_line(run_training_sweep(tmp_path, "hydra/launcher=ray"))
    assert line.startswith("error: hydra/launcher: no option 'ray'")
    assert line.endswith("pip install '.[sweep]'")


def test_sweep_through_slurm_without_slurm_ends_with_one_line(tmp_path):
    assert "srun" in error_line(run_training_sweep(tmp_path, "hydra/launcher=slurm", PATH="/nowhere"))


def error_line(ended):
    """Return the last line of a sweep that ended with an error, after checking that it is one."""
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    *_, last = ended.stderr.strip().splitlines()
    assert last.startswith("error: ")
    return last


def test_slurm_launcher_requests_as_many_cpus_as_threads():
    register_configs()
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("config", ["hydra/launcher=slurm", "threads=3"], return_hydra_config=True)
    assert config.hydra.launcher.cpus_per_task == 3


def test_config_with_zero_threads_raises(compose_config):
    with pytest.raises(ValueError, match=r"threads: .*\b0"):
        OmegaConf.to_object(compose_config("threads=0"))


def test_launcher_failure_of_killed_worker_returns_message():
    with pytest.raises(TerminatedWorkerError) as killed:
        joblib.Parallel(n_jobs=2)(joblib.delayed(os._exit)(9) for _ in range(2))
    assert "worker process" in launcher_failure(killed.value)


def test_launcher_failure_of_killed_submitit_job_returns_message_without_log(tmp_path, monkeypatch):
    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 0)  # its result will not come late
    executor = submitit.LocalExecutor(tmp_path)
    with pytest.raises(submitit.core.utils.UncompletedJobError, match="something long") as killed:
        executor.submit(os.system, "echo something long >&2; kill -9 $PPID").result()
    message = launcher_failure(killed.value)
    assert str(tmp_path) in message
    assert "something long" not in message
    assert "the same command" in message


def test_launcher_failure_of_error_in_a_cell_is_none():
    with pytest.raises(ZeroDivisionError) as error:
        joblib.Parallel(n_jobs=1)(joblib.delayed(Fraction)(1, 0) for _ in range(1))
    assert launcher_failure(error.value) is None
