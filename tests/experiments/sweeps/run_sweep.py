"""Sweeps as a user starts them, and the records that they leave."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
# the middle one fails: what a process takes at once does not divide a step
CELLS = ["data.test=10", "compressor=query", "train.steps=10", "train.micro_batch=2", "train.batch_size=2,3,4"]
# what a finished record says at least of its model
FOUND = {
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


def sweep(results: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """CELLS, in processes that may take as many threads as there are cores."""
    command = [sys.executable, "-m", "experiments.run", "-m", *CELLS, *overrides, f"results={results}"]
    given = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.run(
        command,
        cwd=ROOT,
        env=given | {"HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def finished(results: Path) -> dict[str, dict[str, Any]]:
    """The finished records by file name, without what says where and when they were made."""
    records = {path.name: json.loads(path.read_text()) for path in (results / "records").glob("*.json")}
    for record in records.values():
        del record["provenance"], record["digest"], record["config"]["results"]
    return {name: record for name, record in records.items() if record["status"] == "finished"}


def refused(ended: subprocess.CompletedProcess[str]) -> None:
    """The sweep ends with what was wrong with its middle cells, a line each that names them."""
    assert ended.returncode == 1, ended.stderr
    *said, last = ended.stderr.strip().splitlines()
    assert " failed, " in last
    named = [line for line in said if line.startswith("train.batch_size=3")]
    assert named, ended.stderr
    assert all("failed: ValueError: train.micro_batch 2 does not divide the 3 rows" in line for line in named)
    assert "Traceback" not in ended.stderr
