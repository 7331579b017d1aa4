"""Cells of one process share models and data without side effects, and a cell gives the same record anywhere."""

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

from experiments.config.data_schema import LlavaJsonData, ShapesData
from experiments.config.schema import CheckpointModel, CompressorConfig, Config, PrefusionConfig
from experiments.data.load import load_data
from experiments.data.samples import TextOnlyBaseline
from experiments.data.scenes import IMAGE_SIZE
from experiments.models import build, scratch
from experiments.sweeps.plan import identify_cell
from experiments.sweeps.runner import run_if_needed

ROOT = Path(__file__).resolve().parents[3]
OVERRIDES = [
    "train=short",
    "train.max_steps=10",
    "train.batch_size=4",
    "data.train_samples=40",
    "data.test_samples=12",
    "device=cpu",
]
MINI = ["compressor=query_4", "prefusion.layers=1"]


def llava_and_mini(config: Config) -> dict[str, Config]:
    mini = dataclasses.replace(config, compressor=CompressorConfig("query", 2), prefusion=PrefusionConfig(1))
    return {"llava": config, "mini": mini}


@pytest.fixture
def checkpoint_config(llava, processor, tmp_path):
    """The configuration of a cell that starts from a saved checkpoint."""
    llava.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    model = CheckpointModel(name="llava", path=str(tmp_path / "llava"))
    return Config(model=model, data=ShapesData(name="shapes", train_samples=8, test_samples=8))


@pytest.mark.parametrize("first", ["llava", "mini"])
@pytest.mark.parametrize("second", ["llava", "mini"])
def test_build_model_is_unaffected_by_changes_to_an_earlier_model(checkpoint_config, llava, first, second):
    cells = llava_and_mini(checkpoint_config)
    model, _ = build.build_model(cells[first], None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.requires_grad_(False).train()
    model.config.vision_feature_layer = 0
    rebuilt, _ = build.build_model(cells[second], None)
    weights = rebuilt.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in llava.state_dict().items())
    assert all(parameter.requires_grad for parameter in rebuilt.parameters())
    assert rebuilt.config.vision_feature_layer == llava.config.vision_feature_layer
    assert not rebuilt.training


@pytest.mark.parametrize("model_kind", ["llava", "mini"])
def test_build_model_from_a_cached_llava_equals_one_from_disk(checkpoint_config, model_kind):
    config = llava_and_mini(checkpoint_config)[model_kind]
    build.clear_model_cache()
    torch.rand(3)
    read, _ = build.build_model(config, None)
    drawn = torch.rand(3)
    cached, _ = build.build_model(config, None)
    assert torch.equal(torch.rand(3), drawn)
    assert read.state_dict().keys() == cached.state_dict().keys()
    assert all(torch.equal(cached.state_dict()[name], value) for name, value in read.state_dict().items())
    other, _ = build.build_model(dataclasses.replace(config, seed=1), None)
    differs = [name for name, value in read.state_dict().items() if not torch.equal(other.state_dict()[name], value)]
    assert bool(differs) == (model_kind == "mini")
    assert all("compressor" in name for name in differs)


def test_build_model_takes_as_many_prefusion_layers_as_the_language_model_has(checkpoint_config, processor):
    """The default language model of transformers has 32 layers, which must not matter."""
    deep = scratch.build_llava(processor.tokenizer, IMAGE_SIZE, patch=16, width=32, layers=33)
    deep.save_pretrained(checkpoint_config.model.path)
    config = llava_and_mini(checkpoint_config)["mini"]
    model, _ = build.build_model(dataclasses.replace(config, prefusion=PrefusionConfig(33)), None)
    assert model.config.prefusion_layers == 33
    with pytest.raises(ValueError, match=r"33 layers; .*34"):
        build.build_model(dataclasses.replace(config, prefusion=PrefusionConfig(34)), None)


def test_build_model_reads_a_llava_once_and_again_after_its_folder_changed(checkpoint_config, monkeypatch):
    read = []
    load = build.load_checkpoint
    monkeypatch.setattr(build, "load_checkpoint", lambda *a: read.append(a) or load(*a))
    build.clear_model_cache()
    for config in (
        *llava_and_mini(checkpoint_config).values(),
        checkpoint_config,
        dataclasses.replace(checkpoint_config, seed=3),
    ):
        build.build_model(config, None)
    assert len(read) == 1
    path = Path(checkpoint_config.model.path) / "model.safetensors"
    weights = load_file(path)
    save_file({name: value + 1 for name, value in weights.items()}, path, {"format": "pt"})
    model, _ = build.build_model(checkpoint_config, None)
    assert len(read) == 2
    assert torch.equal(
        next(model.parameters()), next(build._cached_llava[next(iter(build._cached_llava))][0].parameters())
    )
    monkeypatch.setattr(build, "MAX_CACHED_BYTES", 1000)
    build.clear_model_cache()
    build.build_model(checkpoint_config, None)
    build.build_model(checkpoint_config, None)
    assert len(read) == 4
    assert not build._cached_llava


def test_load_data_loads_once_and_again_after_its_file_changed(shapes_split, tmp_path):
    shapes = ShapesData(name="shapes", train_samples=8, test_samples=8)
    data = load_data(shapes)
    assert load_data(dataclasses.replace(shapes)) is data
    assert load_data(dataclasses.replace(shapes, seed=1)) is not data
    shapes_split.samples[0].image.save(tmp_path / "0.png")
    rows = [{"image": "0.png", "conversations": shapes_split.samples[0].conversations}]
    json_config = LlavaJsonData(name="llava_json", path=str(tmp_path / "rows.json"), images=str(tmp_path))
    Path(json_config.path).write_text(json.dumps(rows))
    first = load_data(json_config)
    assert load_data(json_config) is first
    Path(json_config.path).write_text(json.dumps(rows * 2))
    second = load_data(json_config)
    assert second.fingerprint != first.fingerprint
    assert len(second.test) == 2


def test_text_only_baseline_of_loaded_data_equals_that_of_its_samples(shapes_split):
    data = load_data(ShapesData(name="shapes", train_samples=8, test_samples=8))
    baseline = TextOnlyBaseline(shapes_split.samples)
    questions = [(q, k) for s in shapes_split.samples for q, k in zip(s.questions, s.question_types, strict=True)]
    assert [data.text_only_baseline(*pair) for pair in questions] == [baseline(*pair) for pair in questions]
    assert data.text_only_baseline is data.text_only_baseline


def run(config: DictConfig) -> None:
    run_if_needed(identify_cell(config), record_input_errors=False)


def read_record(folder: Path, keep_features: bool) -> dict:
    """Return the one record with seed 7, without times and paths."""
    records = [json.loads(path.read_text()) for path in (folder / "records").glob("*.json")]
    (record,) = [r for r in records if (r["config"]["seed"], r["config"]["keep_features"]) == (7, keep_features)]
    del record["provenance"], record["digest"], record["config"]["results"]
    return record


def test_run_if_needed_gives_the_same_record_in_any_process(compose_config, tmp_path):
    """The cell runs here after other cells, and first in a new process with another hash seed.

    With cached features it runs once more when all features are cached.
    """
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
        run(compose_config(*overrides, here))
    from_features, from_pixels = read_record(tmp_path / "there", True), read_record(tmp_path / "there", False)
    assert read_record(tmp_path / "here", True) == from_features
    assert read_record(tmp_path / "here", False) == from_pixels
    losses = [cell["train"]["log"][0]["loss"] for cell in (from_features, from_pixels)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    shutil.rmtree(tmp_path / "here" / "records")
    run(compose_config(*cell, keep, here))
    assert read_record(tmp_path / "here", True) == from_features
