"""Test the answers of commands that have a new name."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("former", "module"),
    [
        ("experiments.cost.gains", "experiments.benchmarks.speedups"),
        ("experiments.cost.latency", "experiments.benchmarks.prefill_latency"),
        ("experiments.cost.paper", "experiments.benchmarks.model_cost.paper_tables"),
    ],
)
def test_moved_command_exits_with_status_2_and_names_new_command(former: str, module: str) -> None:
    process = subprocess.run([sys.executable, "-m", former, "long=10"], capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert f"`python -m {module}`" in line
    assert importlib.util.find_spec(module) is not None
