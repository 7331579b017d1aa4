"""The launcher `local`: real worker processes, with jobs that import no torch."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hydra.core.utils import JobStatus
from hydra.errors import HydraException

from experiments.errors import one_line
from experiments.sweeps import local_launcher
from experiments.sweeps.hydra_api import Callbacks, compose_sweep, sweep_launcher
from experiments.sweeps.local_launcher import LocalLauncher
from experiments.sweeps.worker_limits import WorkerPlan
from tests.experiments.sweeps.run_sweep import ROOT, TINY_CELL, restored_logging
from tests.experiments.sweeps.worker_tasks import act


@pytest.fixture
def launch(hydra, tmp_path, capsys):
    """A function that launches jobs in two workers and returns their results and the lines on stderr."""

    def run(jobs, *overrides):
        words = ["hydra.launcher.workers=2", *TINY_CELL, *overrides, f"results={tmp_path}"]
        with restored_logging():
            sweep = compose_sweep(hydra, words)
            returned = sweep_launcher(hydra, sweep, act, Callbacks()).launch([[*words[1:], *job] for job in jobs], 0)
        return returned, capsys.readouterr().err.splitlines()

    return run


def notes(folder: Path) -> dict[int, dict]:
    """Return what each job noted of its process, by seed."""
    return {int(path.stem): json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_launch_returns_results_in_the_order_of_jobs_from_two_other_processes(launch, tmp_path):
    returned, _ = launch([[f"seed={seed}"] for seed in (3, 0, 2, 1)])
    assert [job.return_value for job in returned] == [0.75, 0, 0.5, 0.25]
    processes = {note["pid"] for note in notes(tmp_path).values()}
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert {note["OMP_NUM_THREADS"] for note in notes(tmp_path).values()} == {"1"}
    assert not any(psutil.pid_exists(process) for process in processes)


def test_launch_writes_the_lines_of_each_job_together_without_progress_bars(launch):
    _, lines = launch([["name=write", f"seed={seed}"] for seed in (1, 2)])
    blocks = {seed: [f"line {step} of seed {seed}" for step in range(3)] for seed in (1, 2)}
    ends = {seed: next(i for i, line in enumerate(lines) if f"seed={seed}: accuracy" in line) for seed in (1, 2)}
    for seed, end in ends.items():
        assert lines[end - 3 : end] == blocks[seed]
    assert lines[min(ends.values())].startswith("1 of 2: ")
    assert "accuracy 25.0%" in lines[ends[1]]
    assert not any("steps" in line for line in lines)


def test_launch_with_job_that_raises_returns_its_error_and_runs_the_others(launch):
    returned, lines = launch([["seed=0"], ["name=wrong", "seed=1"], ["seed=2"]])
    assert [job.status for job in returned] == [JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.COMPLETED]
    assert str(returned[1]._return_value) == "seed: 1 is wrong"
    assert sum("seed: 1 is wrong" in line for line in lines) == 1


@pytest.mark.parametrize(("death", "cause"), [("die", "SIGKILL"), ("leave", "status 3")])
def test_launch_with_worker_that_dies_fails_its_job_and_runs_the_others(launch, tmp_path, death, cause):
    returned, lines = launch([[f"name={death}", "seed=0"], *([f"seed={seed}"] for seed in (1, 2, 3))])
    assert [job.status == JobStatus.COMPLETED for job in returned] == [False, True, True, True]
    assert str(notes(tmp_path)[0]["pid"]) in str(returned[0]._return_value)
    assert cause in str(returned[0]._return_value)
    assert sum(cause in line for line in lines) == 1


def test_launch_with_workers_that_all_die_starts_another_for_the_jobs_left(launch):
    returned, _ = launch([["name=die", "seed=0"], ["name=die", "seed=1"], ["seed=2"]])
    assert [job.status == JobStatus.COMPLETED for job in returned] == [False, False, True]


def test_launch_with_job_that_exits_ends_all_workers(launch, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        launch([["name=hold", "seed=0"], ["name=exit", "seed=1"], ["seed=2"]])
    assert exit.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: nothing can run"
    assert 2 not in notes(tmp_path)
    assert not any(psutil.pid_exists(note["pid"]) for note in notes(tmp_path).values())


def test_launch_pins_each_worker_to_the_gpu_of_its_plan(launch, tmp_path, monkeypatch):
    plan = WorkerPlan([{"CUDA_VISIBLE_DEVICES": gpu} for gpu in ("5", "MIG-a")], "fake")
    monkeypatch.setattr(local_launcher, "_plan", lambda *_: plan)
    launch([[f"seed={seed}"] for seed in range(2)])
    assert {note["CUDA_VISIBLE_DEVICES"] for note in notes(tmp_path).values()} == {"5", "MIG-a"}


@pytest.mark.parametrize(
    ("jobs", "environment"),
    [([["seed=1"]], {}), ([["seed=1"], ["seed=2"]], {"WORLD_SIZE": "2"})],
    ids=["one job", "distributed"],
)
def test_launch_runs_in_this_process(launch, tmp_path, monkeypatch, jobs, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launch(jobs)
    assert {note["pid"] for note in notes(tmp_path).values()} == {os.getpid()}


def test_launch_of_benchmarks_runs_in_this_process(launch, tmp_path):
    launch([["seed=1"], ["seed=2"]], "experiment=bench_probe")
    assert {note["pid"] for note in notes(tmp_path).values()} == {os.getpid()}


def test_launch_on_one_core_runs_in_this_process(hydra, tmp_path, monkeypatch):
    monkeypatch.setattr("joblib.cpu_count", lambda: 1)
    with restored_logging():
        sweep = compose_sweep(hydra, [*TINY_CELL, f"results={tmp_path}"])
        sweep_launcher(hydra, sweep, act, Callbacks()).launch(
            [[f"seed={seed}", f"results={tmp_path}"] for seed in (1, 2)], 0
        )
    assert {note["pid"] for note in notes(tmp_path).values()} == {os.getpid()}


def test_local_launcher_with_no_workers_raises():
    with pytest.raises(ValueError, match=r"hydra\.launcher\.workers: .*\b0"):
        LocalLauncher(workers=0)


def test_sweep_with_no_workers_names_the_setting_once(launch):
    with pytest.raises(HydraException) as error:
        launch([["seed=0"], ["seed=1"]], "hydra.launcher.workers=0")
    assert one_line(error.value) == "hydra.launcher.workers: must be at least 1, found 0"


@pytest.fixture
def holding_sweep(tmp_path):
    """A sweep in a process of its own, whose two workers hold a lock each and wait, and the workers' processes."""
    overrides = [*TINY_CELL, "name=hold", "seed=0,1,2", "hydra.launcher.workers=2", f"results={tmp_path}"]
    command = [sys.executable, "-m", "tests.experiments.sweeps.worker_tasks", "-m", *overrides]
    # A shell starts background jobs with SIGINT ignored, and a test run that is one passes this on.
    heed_interrupts = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    sweep = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heed_interrupts
    )
    while len(list(tmp_path.glob("*.held"))) < 2:
        assert sweep.poll() is None, sweep.communicate()
        time.sleep(0.05)
    yield sweep, [psutil.Process(note["pid"]) for note in notes(tmp_path).values()]
    if sweep.poll() is None:
        os.killpg(sweep.pid, signal.SIGKILL)
    sweep.communicate()


@pytest.mark.parametrize("whole_group", [True, False], ids=["terminal", "parent"])
def test_sweep_that_is_interrupted_ends_its_workers_and_releases_their_locks(holding_sweep, tmp_path, whole_group):
    sweep, workers = holding_sweep
    (os.killpg if whole_group else os.kill)(sweep.pid, signal.SIGINT)
    _, errors = sweep.communicate(timeout=30)
    assert sweep.returncode == 130
    assert errors.splitlines()[-1] == "interrupted: the same command resumes"
    assert "Traceback" not in errors
    assert "Warning" not in errors
    assert not list((tmp_path / "locks").iterdir())
    assert not psutil.wait_procs(workers, timeout=5)[1]


def test_workers_of_a_killed_sweep_end(holding_sweep):
    sweep, workers = holding_sweep
    sweep.kill()
    assert not psutil.wait_procs(workers, timeout=30)[1]


def test_sweep_whose_worker_is_killed_goes_on_and_names_its_cell(holding_sweep, tmp_path):
    sweep, workers = holding_sweep
    workers[0].kill()
    while 2 not in notes(tmp_path) and workers[1].is_running():
        workers[1].kill()  # the last one is replaced
        time.sleep(0.05)
    while 2 not in notes(tmp_path):
        assert sweep.poll() is None
        time.sleep(0.05)
    psutil.Process(notes(tmp_path)[2]["pid"]).kill()
    _, errors = sweep.communicate(timeout=60)
    assert sweep.returncode == 1
    assert "3 cells: 3 missing" in errors.splitlines()
    assert sum(line.startswith("error: ") and "SIGKILL" in line for line in errors.splitlines()) == 3
    assert "Traceback" not in errors
    assert "Warning" not in errors
