"""Fixtures of the sweep tests."""

from pathlib import Path

import pytest

from experiments.config.registry import register_configs
from experiments.sweeps.hydra_api import open_hydra
from experiments.sweeps.launch import run_sweep
from experiments.task import run_job
from tests.experiments.sweeps.run_sweep import TINY_CELL, restored_logging


@pytest.fixture(scope="module")
def hydra():
    """Hydra with the files in conf/, opened once for all tests of a module."""
    register_configs()
    with open_hydra() as opened:
        yield opened


@pytest.fixture
def sweep(tmp_path, capsys):
    """A function that runs a sweep in this process, over the test's results folder.

    It returns the exit status and the log lines.
    """
    register_configs()

    def run(*overrides: str, results: Path | str = tmp_path) -> tuple[int, list[str]]:
        code = run_sweep([*TINY_CELL, "hydra/launcher=basic", *overrides, f"results={results}"], run_job)
        return code, capsys.readouterr().err.strip().splitlines()

    with restored_logging():
        yield run
