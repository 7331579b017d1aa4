"""What the cells of one process share does not leak from one to the next, and a cell is the same wherever it runs."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file

from experiments.config.schema import (
    CheckpointModel,
    CompressorConfig,
    Config,
    LlavaJsonData,
    PrefusionConfig,
    ShapesData,
)
from experiments.data.load import load_data
from experiments.data.samples import TextGuess
from experiments.models import build
from experiments.sweeps.plan import identify
from experiments.sweeps.runner import attempt

ROOT = Path(__file__).resolve().parents[3]
OVERRIDES = ["train=short", "train.steps=10", "train.batch_size=4", "data.train=40", "data.test=12", "device=cpu"]
MINI = ["compressor=query_4", "prefusion.layers=1"]


def kinds(config: Config) -> dict[str, Config]:
    mini = dataclasses.replace(config, compressor=CompressorConfig("query", 2), prefusion=PrefusionConfig(1))
    return {"llava": config, "mini": mini}


@pytest.fixture
def saved(llava, processor, tmp_path):
    """A checkpoint, and the configuration of a cell that starts from it."""
    llava.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    model = CheckpointModel(name="llava", path=str(tmp_path / "llava"))
    return Config(model=model, data=ShapesData(name="shapes", train=8, test=8))


@pytest.mark.parametrize("first", ["llava", "mini"])
@pytest.mark.parametrize("second", ["llava", "mini"])
def test_no_cell_finds_what_another_did_to_its_model(saved, llava, first, second):
    cells = kinds(saved)
    model, _ = build.build_model(cells[first], None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.requires_grad_(False).train()
    model.config.vision_feature_layer = 0
    again, _ = build.build_model(cells[second], None)
    found = again.state_dict()
    assert all(torch.equal(found[name], value) for name, value in llava.state_dict().items())
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert again.config.vision_feature_layer == llava.config.vision_feature_layer
    assert not again.training


@pytest.mark.parametrize("kind", ["llava", "mini"])
def test_a_kept_llava_makes_the_same_model_as_one_that_was_just_read(saved, kind):
    config = kinds(saved)[kind]
    build.forget()
    torch.rand(3)
    read, _ = build.build_model(config, None)
    drawn = torch.rand(3)
    at_hand, _ = build.build_model(config, None)
    assert torch.equal(torch.rand(3), drawn)
    assert read.state_dict().keys() == at_hand.state_dict().keys()
    assert all(torch.equal(at_hand.state_dict()[name], value) for name, value in read.state_dict().items())
    other, _ = build.build_model(dataclasses.replace(config, seed=1), None)
    differs = [name for name, value in read.state_dict().items() if not torch.equal(other.state_dict()[name], value)]
    assert bool(differs) == (kind == "mini")
    assert all("compressor" in name for name in differs)


def test_a_llava_is_read_once_and_anew_when_its_folder_was_written(saved, monkeypatch):
    read = []
    load = build.load
    monkeypatch.setattr(build, "load", lambda *a: read.append(a) or load(*a))
    build.forget()
    for config in (*kinds(saved).values(), saved, dataclasses.replace(saved, seed=3)):
        build.build_model(config, None)
    assert len(read) == 1
    path = Path(saved.model.path) / "model.safetensors"
    weights = load_file(path)
    save_file({name: value + 1 for name, value in weights.items()}, path, {"format": "pt"})
    model, _ = build.build_model(saved, None)
    assert len(read) == 2
    assert torch.equal(next(model.parameters()), next(build._last[next(iter(build._last))][0].parameters()))
    monkeypatch.setattr(build, "KEPT_BYTES", 1000)
    build.forget()
    build.build_model(saved, None)
    build.build_model(saved, None)
    assert len(read) == 4
    assert not build._last


def test_data_is_loaded_once_and_anew_when_its_file_was_written(few, tmp_path):
    shapes = ShapesData(name="shapes", train=8, test=8)
    data = load_data(shapes)
    assert load_data(dataclasses.replace(shapes)) is data
    assert load_data(dataclasses.replace(shapes, seed=1)) is not data
    few.samples[0].image.save(tmp_path / "0.png")
    rows = [{"image": "0.png", "conversations": few.samples[0].conversations}]
    mine = LlavaJsonData(name="llava_json", path=str(tmp_path / "rows.json"), images=str(tmp_path))
    Path(mine.path).write_text(json.dumps(rows))
    first = load_data(mine)
    assert load_data(mine) is first
    Path(mine.path).write_text(json.dumps(rows * 2))
    second = load_data(mine)
    assert second.fingerprint != first.fingerprint
    assert len(second.test) == 2


def test_the_guess_without_pictures(few):
    data = load_data(ShapesData(name="shapes", train=8, test=8))
    guess = TextGuess(few.samples)
    asked = [(q, k) for s in few.samples for q, k in zip(s.questions, s.kinds, strict=True)]
    assert [data.guess(*pair) for pair in asked] == [guess(*pair) for pair in asked]
    assert data.guess is data.guess


def run(config: DictConfig) -> None:
    attempt(identify(config), record_all=False)


def found(folder: Path, keep: bool) -> dict:
    """The one record with seed 7, without times and places."""
    records = [json.loads(path.read_text()) for path in (folder / "records").glob("*.json")]
    (record,) = [r for r in records if (r["config"]["seed"], r["config"]["keep_features"]) == (7, keep)]
    del record["provenance"], record["digest"], record["config"]["results"]
    return record


def test_a_cell_is_the_same_bit_for_bit_wherever_it_runs(composed, tmp_path):
    """Here after others of this process, there first in a process of its own with other hashes of strings, and with kept
    features once more when all of them are at hand."""
    cell = [*OVERRIDES, *MINI, "seed=7"]
    command = [sys.executable, "-m", "experiments.run", "-m", *cell, "keep_features=true,false"]
    alone = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONHASHSEED": "123", "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [*command, f"results={tmp_path / 'there'}"],
        cwd=ROOT,
        env={**os.environ, **alone},
        check=True,
        capture_output=True,
    )
    keep, here = "keep_features=true", f"results={tmp_path / 'here'}"
    for overrides in ([*OVERRIDES, *MINI, "seed=8", keep], [*cell, keep], cell):
        run(composed(*overrides, here))
    kept, pixels = found(tmp_path / "there", True), found(tmp_path / "there", False)
    assert found(tmp_path / "here", True) == kept
    assert found(tmp_path / "here", False) == pixels
    losses = [cell["train"]["log"][0]["loss"] for cell in (kept, pixels)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    shutil.rmtree(tmp_path / "here" / "records")
    run(composed(*cell, keep, here))
    assert found(tmp_path / "here", True) == kept
