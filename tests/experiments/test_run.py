"""The command line as a user meets it: what works, and how each kind of bad input ends."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra.errors import HydraException
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from experiments.config import plain, schema
from experiments.errors import one_line
from experiments.files import ASSETS
from tests.experiments.conftest import required

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.run", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_is_typed(composed, experiment):
    config = OmegaConf.to_object(composed(f"experiment={experiment}", *required("experiment", experiment)))
    assert isinstance(config, schema.Config)
    assert config.name == experiment


@pytest.mark.parametrize("path", sorted((ROOT / "conf").glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_option_composes(composed, path):
    resolved = plain.resolved(composed(f"{path.parent.name}={path.stem}", *required(path.parent.name, path.stem)))
    assert yaml.safe_dump(resolved)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["seeed=1"], "seeed"),
        (["train.steps=many"], "many"),
        (["model=none"], "model"),
        (["model=checkpoint"], "model.path"),
        (["model=checkpoint", "model.path=./no/such/folder"], "no folder './no/such/folder'"),
        (["data=llava_json", "data.path=none.json", "data.images=."], "data.path: no file 'none.json'"),
        (["results=/proc/results"], "results folder '/proc/results' cannot be written"),
        (["model.dtype=int8"], "'int8' is no floating type"),
        (["probe.block=99"], "99 layers at once in a model of 6; use 1 to 6"),
    ],
)
def test_bad_input_ends_with_one_line_and_writes_nothing(tmp_path, arguments, said):
    results = [] if any(a.startswith("results=") for a in arguments) else [f"results={tmp_path / 'results'}"]
    refused(run(*arguments, "data.test=1", *results), said)
    assert not list((tmp_path / "results").rglob("*.json"))


def refused(ended: subprocess.CompletedProcess[str], said: str) -> None:
    assert ended.returncode == 1
    *_, last = ended.stderr.strip().splitlines()
    assert last.startswith("error: ")
    assert said in last
    assert "Traceback" not in ended.stderr
    assert "Error executing job" not in ended.stderr  # Hydra's own line


CHAT = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "this"}]


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([{"id": "1", "image": "broken.png", "conversations": CHAT}], "broken.png cannot be read as an image"),
        ([{"id": "1", "image": "none.png", "conversations": CHAT}], "none.png"),
        ({"a": 1}, "expected a list of conversations"),
        ([{"id": "1", "text": "hello"}], "entry 0"),
    ],
)
def test_bad_data_ends_with_one_line_and_writes_nothing(tmp_path, entries, said):
    (tmp_path / "broken.png").write_text("no image")
    (tmp_path / "data.json").write_text(json.dumps(entries))
    data = ["data=llava_json", f"data.path={tmp_path / 'data.json'}", f"data.images={tmp_path}"]
    refused(run(*data, f"results={tmp_path / 'results'}"), said)
    assert not list((tmp_path / "results").rglob("*.json"))


def test_lost_weights_end_with_one_line(tmp_path):
    shutil.copytree(ASSETS / "tiny", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    lost = next(name for name in weights if "layers.3.mlp.up_proj" in name)
    del weights[lost]
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    model = ["model=checkpoint", f"model.path={tmp_path / 'model'}"]
    refused(run(*model, "data.test=1", f"results={tmp_path / 'results'}"), "lacks 1 weights, the first is")


def test_one_line_keeps_what_is_wrong():
    error = HydraException("a\n  b")
    error.__cause__ = KeyError("c")
    assert one_line(error) == "a b 'c'"
