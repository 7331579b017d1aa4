"""Each flag and each setting of Hydra's own does here what it does in a plain Hydra application with the files in conf/."""

import os
import shutil
import sys
from pathlib import Path

import hydra
import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import OmegaConf

from experiments import run
from experiments.config.registry import register_configs
from experiments.errors import FULL_ERROR_VARIABLE
from experiments.sweeps.hydra_api import CONF
from tests.experiments.sweeps.run_sweep import TINY_CELL, restored_logging

NAME = f"{__name__}.NotingCallback"
notes = []


class NotingCallback(Callback):
    """Note which of its methods Hydra calls, in order."""

    def on_run_start(self, config, **_):
        notes.append("run starts")

    def on_run_end(self, config, **_):
        notes.append("run ends")

    def on_multirun_start(self, config, **_):
        notes.append("sweep starts")

    def on_multirun_end(self, config, **_):
        notes.append("sweep ends")

    def on_job_start(self, config, **_):
        notes.append("job starts")

    def on_job_end(self, config, job_return, **_):
        notes.append("job ends")


def note_job(config):
    """A job: note its configuration, Hydra's folder and the current folder."""
    notes.append((OmegaConf.to_yaml(config), HydraConfig.get().runtime.output_dir, Path.cwd()))


@pytest.fixture
def outcome(monkeypatch, capsys, tmp_path):
    """A function that runs a command line with `note_job`, and returns everything that can be observed of it."""
    monkeypatch.setenv(FULL_ERROR_VARIABLE, "")  # the program sets it; the test's end restores it
    monkeypatch.setattr(run, "run_job", note_job)
    folder = tmp_path / "project"
    register_configs()

    def call(main, arguments):
        notes.clear()
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "own" / "experiment").mkdir(parents=True)
        (folder / "own" / "experiment" / "mine.yaml").write_text("# @package _global_\nname: mine\n")
        (folder / "own" / "other.yaml").write_text("defaults: [config, _self_]\nname: other\n")
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["run", *arguments])
        status = 0
        with restored_logging():  # Hydra adds a handler that prints, which the next call must not have
            try:
                main()
            except SystemExit as ended:
                status = ended.code or 0
        shown, _ = capsys.readouterr()
        folders = sorted(str(path) for path in folder.rglob("*") if path.is_dir() and path.name != "records")
        return status, shown, list(notes), Path.cwd(), folders

    return call


def plain_main():
    """Run a plain Hydra application over the files in conf/."""
    hydra.main(version_base="1.3", config_path=CONF, config_name="config")(note_job)()


JOBS = {
    "one job": ["seed=1"],
    "run folder": ["hydra.run.dir=there"],
    "run folder as current folder": ["hydra.run.dir=there", "hydra.job.chdir=true"],
    "run files": ["hydra.run.dir=there", "hydra.output_subdir=files"],
    "callback": [f"+hydra.callbacks.note._target_={NAME}"],
    "config name": ["-cd", "own", "-cn", "other"],
    "config folder": ["--config-dir", "own", "experiment=mine"],
    "search path": ["hydra.searchpath=[file://own]", "experiment=mine"],
    "job name": ["hydra.job.name=mine", "hydra.run.dir=${hydra.job.name}"],
    "environment": ["+hydra.job.env_set.NOTED=1", "name=${oc.env:HOME}"],
}
SWEEPS = {
    "sweep": ["seed=1,2"],
    "sweep folder": ["seed=1,2", "hydra.sweep.dir=there", "hydra.sweep.subdir=${hydra.job.num}"],
    "sweep folders by override": ["seed=1,2", "hydra.sweep.subdir=${hydra.job.override_dirname}"],
    "job folder as current folder": ["seed=1,2", "hydra.sweep.subdir=${hydra.job.num}", "hydra.job.chdir=true"],
    "callback of a sweep": ["seed=1,2", f"+hydra.callbacks.note._target_={NAME}"],
}
SHOWN = {
    "job": ["--cfg", "job", "seed=3"],
    "hydra": ["--cfg", "hydra"],
    "resolved": ["--cfg", "job", "--resolve"],
    "package": ["--cfg", "job", "--package", "train"],
    "package of hydra": ["--cfg", "all", "-p", "hydra.sweep"],
    "configuration": ["--info", "config"],
    "defaults": ["--info", "defaults"],
    "defaults tree": ["--info", "defaults-tree"],
    "search path": ["--info", "searchpath"],
    "help": ["--help"],
    "help of plain applications": ["hydra/help=default", "--help"],
    "hydra help": ["--hydra-help"],
    "version": ["--version"],
}


@pytest.mark.parametrize("arguments", JOBS.values(), ids=JOBS)
def test_run_gives_the_job_folders_and_calls_of_plain_hydra(outcome, arguments):
    expected = outcome(plain_main, arguments)
    assert expected[0] == 0
    assert any(isinstance(note, tuple) for note in expected[2])
    assert outcome(run.main, arguments) == expected


@pytest.mark.parametrize("arguments", SWEEPS.values(), ids=SWEEPS)
def test_sweep_gives_the_jobs_folders_and_calls_of_plain_hydra(outcome, tmp_path, arguments):
    cells = ["-m", *TINY_CELL, "hydra/launcher=basic", f"results={tmp_path / 'results'}", *arguments]
    expected = outcome(plain_main, cells)
    found = outcome(run.main, cells)
    assert len([note for note in expected[2] if isinstance(note, tuple)]) == 2
    assert found[0] == 1  # no job left a record
    assert found[2:] == expected[2:]


@pytest.mark.parametrize("arguments", SHOWN.values(), ids=SHOWN)
def test_flag_that_shows_prints_what_plain_hydra_prints(outcome, arguments):
    expected = outcome(plain_main, arguments)
    assert expected[1].strip()
    assert outcome(run.main, arguments) == expected
    assert not expected[2]


def test_shell_completion_of_bash_names_the_program(outcome):
    expected = outcome(plain_main, ["-sc", "install=bash"])
    assert "hydra_bash_completion" in expected[1]
    assert outcome(run.main, ["-sc", "install=bash"]) == expected


def test_environment_of_a_job_is_restored_after_it(outcome):
    outcome(run.main, ["+hydra.job.env_set.NOTED=1"])
    assert "NOTED" not in os.environ
