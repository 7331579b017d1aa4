"""Several processes that train together, through the command that a user types."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from experiments.training.trainer import last_checkpoint

ROOT = Path(__file__).resolve().parents[3]
TRAINING = ["model=tiny", "device=cpu", "data.train=40", "data.test=6", "train.batch_size=4", "train.warmup=2"]


def start(results: Path, processes: int, *overrides: str) -> subprocess.Popen[str]:
    """A cell, trained by one process or by several."""
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


def trained(results: Path, processes: int, *overrides: str) -> dict[str, Any]:
    """The one record that a cell leaves."""
    process = start(results, processes, *overrides)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    (path,) = (results / "records").glob("*.json")
    assert not list((results / "work").glob("*"))
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["train.steps=20"],
        # 40 rows make ten whole steps an epoch: no process has to make up for missing ones
        [
            "compressor=query",
            "prefusion.layers=1",
            "train.epochs=2",
            "train.group_by_length=true",
            "train.micro_batch=1",
        ],
        ["compressor=query", "prefusion.layers=1", "train.steps=20", "train.lora=2"],
    ],
    ids=["llava", "mini", "adapters"],
)
def test_two_processes_learn_as_one_with_twice_the_rows(tmp_path, overrides):
    """`batch_size` counts the rows of a step over all processes: half of them each."""
    one, two = (trained(tmp_path / str(n), n, *overrides) for n in (1, 2))
    assert one["id"] == two["id"]
    losses, expected = ([log["loss"] for log in record["train"]["log"] if "loss" in log] for record in (two, one))
    assert len(expected) == 3  # of the first step, the tenth and the twentieth
    assert expected[1] > expected[2]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert two["accuracy"] == one["accuracy"]


@pytest.mark.slow
def test_killed_within_an_epoch_and_resumed(tmp_path):
    """Two processes go on through the rows of the epoch that they were killed in, and end with the same weights."""
    overrides = ["train.epochs=10", "train.save_every=14"]  # of ten steps each
    whole = trained(tmp_path / "whole", 2, *overrides, f"save={tmp_path / 'model'}")
    killed = start(tmp_path / "cut", 2, *overrides)
    while not list((tmp_path / "cut" / "work").glob("*/checkpoint-14/trainer_state.json")):
        assert killed.poll() is None
        time.sleep(0.05)
    launcher = psutil.Process(killed.pid)
    for process in [*launcher.children(recursive=True), launcher]:
        process.kill()
    killed.wait()
    (work,) = (tmp_path / "cut" / "work").glob("*")
    found = last_checkpoint(work)
    assert found in (work / "checkpoint-14", work / "checkpoint-28")
    resumed = trained(tmp_path / "cut", 2, *overrides, f"save={tmp_path / 'again'}")
    assert resumed["id"] == whole["id"]
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("model", "again")]
    assert weights[0] == weights[1]
