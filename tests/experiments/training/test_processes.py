"""Distributed training, started by the command line."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from experiments.training.trainer import latest_complete_checkpoint

ROOT = Path(__file__).resolve().parents[3]
TRAINING = [
    "model=tiny",
    "device=cpu",
    "data.train_samples=40",
    "data.test_samples=6",
    "train.batch_size=4",
    "train.warmup_steps=2",
]


def start(results: Path, processes: int, *overrides: str) -> subprocess.Popen[str]:
    """Start a cell that one or several processes train."""
    launch = (
        ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"] if processes > 1 else []
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launch, "experiments.run", *TRAINING, *overrides, f"results={results}"]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train_cell(results: Path, processes: int, *overrides: str) -> dict[str, Any]:
    """Train a cell, and return its one record."""
    process = start(results, processes, *overrides)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    (path,) = (results / "records").glob("*.json")
    assert not list((results / "work").glob("*"))
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["train.max_steps=20"],
        # 40 rows make ten full steps per epoch, so no process has to repeat rows
        [
            "compressor=query",
            "prefusion.layers=1",
            "train.num_train_epochs=2",
            "train.group_by_length=true",
            "train.per_device_train_batch_size=1",
        ],
        ["compressor=query", "prefusion.layers=1", "train.max_steps=20", "train.lora_rank=2"],
    ],
    ids=["llava", "mini", "adapters"],
)
def test_training_with_two_processes_equals_one_with_twice_the_rows(tmp_path, overrides):
    """`batch_size` counts the rows of a step over all processes, so each takes half of them."""
    one, two = (train_cell(tmp_path / str(n), n, *overrides) for n in (1, 2))
    assert one["id"] == two["id"]
    losses, expected = ([log["loss"] for log in record["train"]["log"] if "loss" in log] for record in (two, one))
    assert len(expected) == 3  # after steps 1, 10 and 20
    assert expected[1] > expected[2]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert two["accuracy"] == one["accuracy"]


@pytest.mark.slow
def test_training_killed_within_an_epoch_resumes_to_the_same_weights(tmp_path):
    """Two processes resume in the middle of the epoch in which they were killed."""
    overrides = ["train.num_train_epochs=10", "train.save_steps=14"]  # of ten steps per epoch
    uninterrupted = train_cell(tmp_path / "uninterrupted", 2, *overrides, f"save={tmp_path / 'model'}")
    killed = start(tmp_path / "interrupted", 2, *overrides)
    while not list((tmp_path / "interrupted" / "work").glob("*/checkpoint-14/trainer_state.json")):
        assert killed.poll() is None
        time.sleep(0.05)
    launcher = psutil.Process(killed.pid)
    for process in [*launcher.children(recursive=True), launcher]:
        process.kill()
    killed.wait()
    (work,) = (tmp_path / "interrupted" / "work").glob("*")
    checkpoint = latest_complete_checkpoint(work)
    assert checkpoint in (work / "checkpoint-14", work / "checkpoint-28")
    resumed = train_cell(tmp_path / "interrupted", 2, *overrides, f"save={tmp_path / 'again'}")
    assert resumed["id"] == uninterrupted["id"]
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("model", "again")]
    assert weights[0] == weights[1]
