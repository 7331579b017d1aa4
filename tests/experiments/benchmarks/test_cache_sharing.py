"""Test the sharing benchmark: caches in each mode, the record, and the ratios of its table."""

import json
import statistics
from pathlib import Path

import pytest

from experiments import run_cell
from experiments.benchmarks import cache_sharing
from experiments.benchmarks.cache_sharing import (
    SHARE_BASE_AND_DATA,
    SHARE_FEATURES_TOO,
    SHARE_NOTHING,
    sharing_gains,
    sharing_markdown,
)
from experiments.data import load as load_module
from experiments.models import build

SHORT = [
    "train=short",
    "train.max_steps=2",
    "train.batch_size=4",
    "data.train_samples=20",
    "data.test_samples=6",
    "device=cpu",
]


@pytest.fixture
def sweep(llava, processor, tmp_path):
    """Return the overrides of two cells on an untrained LLaVA."""
    llava.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    model = ["model=checkpoint", "model.name=small", f"model.path={tmp_path / 'llava'}"]
    return [*model, *SHORT, "train.learning_rate=0.001,0.002", f"results={tmp_path / 'results'}"]


@pytest.fixture
def load_counts(monkeypatch):
    """Count loaded models and data splits, and list each request for cached features.

    A request is the results folder of the cell and the number of feature files in it.
    """
    counts = {"models": 0, "splits": 0, "features": []}
    load, load_shapes, open_feature_cache = build.load_checkpoint, load_module.load_shapes, run_cell.open_feature_cache

    def counted_load(*args):
        counts["models"] += 1
        return load(*args)

    def counted_shapes(*args):
        counts["splits"] += 1
        return load_shapes(*args)

    def listed_features(config, *args):
        if config.keep_features:
            counts["features"].append((config.results, len(list(Path(config.results).glob("shared/*")))))
        return open_feature_cache(config, *args)

    monkeypatch.setattr(build, "load_checkpoint", counted_load)
    monkeypatch.setattr(load_module, "load_shapes", counted_shapes)
    monkeypatch.setattr(run_cell, "open_feature_cache", listed_features)
    build.clear_model_cache()
    load_module.clear_data_cache()
    return counts


def test_main_runs_each_mode_from_empty_caches(sweep, load_counts, tmp_path, capsys):
    assert cache_sharing.main([*sweep, f"save={tmp_path / 'saved'}", "probe.controls=true", "--rounds", "2"]) == 0
    # One cell does not count. Each of two rounds has two cells that share nothing, and two modes that load once.
    assert load_counts["models"] == 1 + 2 * (2 + 1 + 1)
    assert load_counts["splits"] == 2 * (1 + load_counts["models"]), (
        "train and test; once more for the identities of the cells"
    )
    folders = list(dict.fromkeys(folder for folder, _ in load_counts["features"]))
    files = [[count for folder, count in load_counts["features"] if folder == one] for one in folders]
    assert files == [[0, 1], [0, 1, 2, 2], [0, 1, 2, 2]], "written in each turn, used by its second cell"

    path, page = sorted((tmp_path / "results").rglob("*.*"))[-2:]
    assert sorted((tmp_path / "results").rglob("*")) == [tmp_path / "results" / "sharing", path, page]
    assert not (tmp_path / "saved").exists()
    record, text = json.loads(path.read_text()), page.read_text()
    assert text in capsys.readouterr().out
    assert [(cell["name"], cell["steps"], cell["questions"]) for cell in record["cells"]] == [
        ("train.learning_rate=0.001", 2, 6),
        ("train.learning_rate=0.002", 2, 6),
    ]
    assert record["provenance"]["device"] == "cpu (1 threads)"
    nothing, base_and_data, features = record["ways"]
    assert [mode["shared"] for mode in record["ways"]] == [SHARE_NOTHING, SHARE_BASE_AND_DATA, SHARE_FEATURES_TOO]
    for mode in (nothing, base_and_data):
        assert (mode["answers"], mode["answers_changed"], mode["loss_changed"]) == (2 * 2 * 3 * 6, 0, 0.0)
    assert 0 < features["loss_changed"] < 1e-2, "rounded to bf16"
    for mode in record["ways"]:
        assert [len(turn) for turn in mode["turns"]] == [2, 2]
        for clock, name in (("cpu", "CPU"), ("seconds", "clock")):
            (first, later), (other, last) = ([cell[clock] for cell in turn] for turn in mode["turns"])
            assert min(first, later, other, last) > 0
            (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} | {mode['shared']} |")]
            assert f"| {(first + other) / 2:.2f} ({min(first, other):.2f} to {max(first, other):.2f}) |" in line
            assert f" to {max(later, last):.2f}) | {3600 / statistics.mean([later, last]):,.0f} |" in line
    assert "train.learning_rate=0.002: 2 steps, 6 questions. cpu (1 threads), medians of 2 rounds" in text
    assert f"features: {features['answers_changed']} of 72, {features['loss_changed']:.1e}." in text


def planted_record():
    """Return a record of three rounds of three cells, whose later cells take different times."""

    def mode(shared, *turns):
        times = [[{"cpu": float(cpu), "seconds": 10.0 * cpu} for cpu in turn] for turn in turns]
        return {"shared": shared, "turns": times, "answers": 1800, "answers_changed": 3, "loss_changed": 2e-5}

    modes = [
        mode(SHARE_NOTHING, [8, 6, 10], [6, 7, 11], [10, 5, 7]),
        mode(SHARE_BASE_AND_DATA, [8, 4, 4], [9, 5, 7], [8, 2, 4]),
        mode(SHARE_FEATURES_TOO, [16, 1, 3], [12, 2, 4], [10, 2, 2]),
    ]
    cells = [{"name": name, "id": name, "steps": 5, "questions": 100} for name in "abc"]
    config = {"model": {"name": "planted"}}
    return {"rounds": 3, "cells": cells, "ways": modes, "config": config, "provenance": {"device": "cpu (1 threads)"}}


def test_sharing_gains_separate_first_and_later_cells():
    rows = {(row["clock"], row["shared"]): row for row in sharing_gains(planted_record())}
    plain, features = rows["cpu", SHARE_NOTHING], rows["cpu", SHARE_FEATURES_TOO]
    assert (plain["later"].middle, plain["later"].low, plain["later"].high) == (8, 6, 9)
    assert (plain["first_cost"].low, plain["gain"].high) == (1, 1)
    assert features["first"].middle == 12
    assert (features["first_cost"].middle, features["first_cost"].low, features["first_cost"].high) == (12 / 8, 1, 2)
    assert (features["gain"].middle, features["gain"].low, features["gain"].high) == (8 / 2, 3, 4)
    assert (plain["an_hour"], features["an_hour"]) == (450, 1800)
    assert rows["seconds", SHARE_FEATURES_TOO]["an_hour"] == 180
    assert rows["seconds", SHARE_FEATURES_TOO]["gain"].middle == 4


def test_sharing_markdown_has_row_for_each_clock_and_mode():
    page = sharing_markdown(planted_record())
    line = "12.00 (10.00 to 16.00) | 1.50 (1.00 to 2.00) | 2.00 (2.00 to 3.00) | 1,800 | 4.00 (3.00 to 4.00) |"
    assert f"| CPU | {SHARE_FEATURES_TOO} | {line}\n" in page
    assert f"| clock | {SHARE_BASE_AND_DATA} | 80.00 (80.00 to 90.00) | 1.00 (0.80 to 1.50) | 40.00" in page
    assert "Cells of planted, in this order: a: 5 steps, 100 questions; b: 5 steps, 100 questions; c: 5" in page
    assert f"{SHARE_FEATURES_TOO}: 3 of 1,800, 2.0e-05" in page


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["seed=3"], ["two or more cells, found 1", "several values"]),
        (["experiment=bench_probe"], ["two or more cells, found 0"]),
        (["seed=1,1"], ["two or more cells, found 1"]),
        (["seed=0,1", "--rounds", "0"], ["rounds: must be at least 1, found 0"]),
        (["seed=0,1", "train.train_vision=true"], ["keep_features", "train.train_vision"]),
        (["seed=0,1", "nothing=1"], ["nothing"]),
        (
            ["seed=0,1", *SHORT, "train.per_device_train_batch_size=3"],
            ["train.per_device_train_batch_size", " 3 ", "4 rows"],
        ),
    ],
)
def test_main_invalid_input_exits_with_one_line(overrides, parts, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cache_sharing.main([*overrides, f"results={tmp_path}"])
    assert exit_info.value.code == 1
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert all(part in line for part in parts)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_main_results_path_is_file_exits_with_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        cache_sharing.main(["seed=0,1", f"results={tmp_path / 'file'}"])
    assert capsys.readouterr().err.strip().endswith("file' cannot be written (Not a directory)")


def test_main_failing_cell_exits_with_its_error(sweep, monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise ArithmeticError("no number")

    monkeypatch.setattr(run_cell, "run_cell", fail)
    with pytest.raises(SystemExit):
        cache_sharing.main(sweep)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == "error: small, 2 steps, seed 0 failed: ArithmeticError: no number"
    assert not [path for path in (tmp_path / "results").rglob("*") if path.is_file()]
