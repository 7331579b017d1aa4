"""Helpers of the sweep tests: sweeps in processes of their own, cells of the tiny model, and minimal records."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.cell import Cell
from experiments.config.registry import register_configs
from experiments.sweeps.hydra_api import open_hydra
from experiments.sweeps.plan import expand_sweep
from experiments.sweeps.store import RecordStore

ROOT = Path(__file__).resolve().parents[3]
# Three cells that train for four steps. The middle one fails: a forward pass of 2 does not divide a step of 3.
TRAINING_SWEEP = [
    "data.train_samples=60",
    "data.test_samples=10",
    "compressor=query",
    "train.max_steps=4",
    "train.per_device_train_batch_size=2",
    "train.batch_size=2,3,4",
]
# One cell that trains nothing and answers two questions.
TINY_CELL = ("model=tiny", "data.train_samples=8", "data.test_samples=2", "device=cpu")
# The least that a finished record holds of its model, its data and its accuracy.
MINIMAL_MEASUREMENT = {
    "model": {
        "label": "LLaVA",
        "layers": 2,
        "visual_tokens": 9,
        "prefusion_layers": 0,
        "compressor": "none",
        "parameters": 1,
    },
    "data": {"name": "shapes", "fingerprint": "f", "examples": 4, "kinds": ["count"] * 4},
    "accuracy": {"image": "0110"},
}


def run_training_sweep(results: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run TRAINING_SWEEP in a process of its own, whose environment does not limit the number of threads."""
    command = [sys.executable, "-m", "experiments.run", "-m", *TRAINING_SWEEP, *overrides, f"results={results}"]
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.run(
        command,
        cwd=ROOT,
        env=inherited | {"HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def finished_records(results: Path) -> dict[str, dict[str, Any]]:
    """Return the finished records by file name, without the parts that depend on when and where they were made."""
    records = {path.name: json.loads(path.read_text()) for path in (results / "records").glob("*.json")}
    for record in records.values():
        del record["provenance"], record["digest"], record["config"]["results"]
    return {name: record for name, record in records.items() if record["status"] == "finished"}


def assert_failed_cells_are_named(sweep: subprocess.CompletedProcess[str]) -> None:
    """Assert that TRAINING_SWEEP ended with status 1, and with one line for each cell of the failing batch size."""
    assert sweep.returncode == 1, sweep.stderr
    *lines, last = sweep.stderr.strip().splitlines()
    assert " failed, " in last
    failures = [line for line in lines if line.startswith("train.batch_size=3")]
    assert failures, sweep.stderr
    for line in failures:
        assert "failed: ValueError: train.per_device_train_batch_size: 2 does not divide the 3 rows" in line
    assert "Traceback" not in sweep.stderr


def tiny_cell(results: Path, *overrides: str) -> Cell:
    """Return the cell of TINY_CELL with some overrides."""
    register_configs()
    with open_hydra() as hydra:
        (job,) = expand_sweep(hydra, [*TINY_CELL, *overrides, f"results={results}"])[1]
    assert job.cell
    return job.cell


def write_minimal_record(cell: Cell, state: str, seconds: float) -> None:
    """Write a record of a cell that was not run.

    Args:
        cell: The cell.
        state: "finished" or "failed".
        seconds: How long it took.
    """
    store = RecordStore(cell.config.results)
    store.prepare()
    store.write(
        MINIMAL_MEASUREMENT
        | {
            "schema": 1,
            "id": cell.id,
            "experiment": cell.config.name,
            "name": cell.label,
            "status": state,
            "error": None if state == "finished" else "ValueError: [no]",
            "config": cell.resolved,
            "provenance": {"started": "2026-01-01T00:00:00+00:00", "seconds": seconds},
        }
    )


@contextmanager
def restored_logging() -> Iterator[None]:
    """Undo at the end of the block the logging setup that Hydra makes inside it."""
    root, ours = logging.getLogger(), logging.getLogger("experiments")
    before = root.handlers[:], root.level, ours.level
    try:
        yield
    finally:
        root.handlers[:], root.level, ours.level = before
