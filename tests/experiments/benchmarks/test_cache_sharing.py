"""The measurement of what cells share: what is at hand in each way, what is reported of it, and the sums of its table."""

import json
import statistics
from pathlib import Path

import pytest

from experiments import run_cell
from experiments.benchmarks import cache_sharing
from experiments.benchmarks.cache_sharing import FEATURES, KEPT, NOTHING, gains, table
from experiments.data import load as load_module
from experiments.models import build

SHORT = ["train=short", "train.steps=2", "train.batch_size=4", "data.train=20", "data.test=6", "device=cpu"]


@pytest.fixture
def sweep(llava, processor, tmp_path):
    """The overrides of two cells on a LLaVA with nothing learned."""
    llava.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    model = ["model=checkpoint", "model.name=small", f"model.path={tmp_path / 'llava'}"]
    return [*model, *SHORT, "train.learning_rate=0.001,0.002", f"results={tmp_path / 'results'}"]


@pytest.fixture
def at_hand(monkeypatch):
    """What is read and loaded, and for each time that features are asked for the cell's results folder and how many files
    of features lie there already."""
    seen = {"models": 0, "splits": 0, "features": []}
    load, load_shapes, keep_features = build.load, load_module.load_shapes, run_cell.keep_features

    def read(*args):
        seen["models"] += 1
        return load(*args)

    def loaded(*args):
        seen["splits"] += 1
        return load_shapes(*args)

    def kept(config, *args):
        if config.keep_features:
            seen["features"].append((config.results, len(list(Path(config.results).glob("shared/*")))))
        return keep_features(config, *args)

    monkeypatch.setattr(build, "load", read)
    monkeypatch.setattr(load_module, "load_shapes", loaded)
    monkeypatch.setattr(run_cell, "keep_features", kept)
    build.forget()
    load_module.forget()
    return seen


def test_the_command_runs_each_way_from_nothing(sweep, at_hand, tmp_path, capsys):
    assert cache_sharing.main([*sweep, f"save={tmp_path / 'saved'}", "probe.controls=true", "--rounds", "2"]) == 0
    # one cell that does not count; in each of two rounds two cells that share nothing, and two ways that read once
    assert at_hand["models"] == 1 + 2 * (2 + 1 + 1)
    assert at_hand["splits"] == 2 * (1 + at_hand["models"]), "train and test; once more to know the cells by"
    folders = list(dict.fromkeys(folder for folder, _ in at_hand["features"]))
    files = [[count for folder, count in at_hand["features"] if folder == one] for one in folders]
    assert files == [[0, 1], [0, 1, 2, 2], [0, 1, 2, 2]], "filled anew in each turn, found by its second cell"

    path, page = sorted((tmp_path / "results").rglob("*.*"))[-2:]
    assert sorted((tmp_path / "results").rglob("*")) == [tmp_path / "results" / "sharing", path, page]
    assert not (tmp_path / "saved").exists()
    record, told = json.loads(path.read_text()), page.read_text()
    assert told in capsys.readouterr().out
    assert [(one["name"], one["steps"], one["questions"]) for one in record["cells"]] == [
        ("train.learning_rate=0.001", 2, 6),
        ("train.learning_rate=0.002", 2, 6),
    ]
    assert record["provenance"]["device"] == "cpu (1 threads)"
    nothing, kept, features = record["ways"]
    assert [way["shared"] for way in record["ways"]] == [NOTHING, KEPT, FEATURES]
    for way in (nothing, kept):
        assert (way["answers"], way["answers_changed"], way["loss_changed"]) == (2 * 2 * 3 * 6, 0, 0.0)
    assert 0 < features["loss_changed"] < 1e-2, "rounded to bf16"
    for way in record["ways"]:
        assert [len(turn) for turn in way["turns"]] == [2, 2]
        for clock, name in (("cpu", "CPU"), ("seconds", "clock")):
            (first, later), (other, last) = ([one[clock] for one in turn] for turn in way["turns"])
            assert min(first, later, other, last) > 0
            (line,) = [line for line in told.splitlines() if line.startswith(f"| {name} | {way['shared']} |")]
            assert f"| {(first + other) / 2:.2f} ({min(first, other):.2f} to {max(first, other):.2f}) |" in line
            assert f" to {max(later, last):.2f}) | {3600 / statistics.mean([later, last]):,.0f} |" in line
    assert "train.learning_rate=0.002: 2 steps, 6 questions. cpu (1 threads), medians of 2 rounds" in told
    assert f"features: {features['answers_changed']} of 72, {features['loss_changed']:.1e}." in told


def planted():
    """Three rounds of three cells: later ones are of unlike length."""

    def way(shared, *turns):
        times = [[{"cpu": float(cpu), "seconds": 10.0 * cpu} for cpu in turn] for turn in turns]
        return {"shared": shared, "turns": times, "answers": 1800, "answers_changed": 3, "loss_changed": 2e-5}

    ways = [
        way(NOTHING, [8, 6, 10], [6, 7, 11], [10, 5, 7]),
        way(KEPT, [8, 4, 4], [9, 5, 7], [8, 2, 4]),
        way(FEATURES, [16, 1, 3], [12, 2, 4], [10, 2, 2]),
    ]
    cells = [{"name": name, "id": name, "steps": 5, "questions": 100} for name in "abc"]
    config = {"model": {"name": "planted"}}
    return {"rounds": 3, "cells": cells, "ways": ways, "config": config, "provenance": {"device": "cpu (1 threads)"}}


def test_first_and_later_cells_are_told_apart():
    rows = {(row["clock"], row["shared"]): row for row in gains(planted())}
    plain, features = rows["cpu", NOTHING], rows["cpu", FEATURES]
    assert (plain["later"].middle, plain["later"].low, plain["later"].high) == (8, 6, 9)
    assert (plain["first_cost"].low, plain["gain"].high) == (1, 1)
    assert features["first"].middle == 12
    assert (features["first_cost"].middle, features["first_cost"].low, features["first_cost"].high) == (12 / 8, 1, 2)
    assert (features["gain"].middle, features["gain"].low, features["gain"].high) == (8 / 2, 3, 4)
    assert (plain["an_hour"], features["an_hour"]) == (450, 1800)
    assert rows["seconds", FEATURES]["an_hour"] == 180
    assert rows["seconds", FEATURES]["gain"].middle == 4


def test_the_table_of_a_record():
    told = table(planted())
    line = "12.00 (10.00 to 16.00) | 1.50 (1.00 to 2.00) | 2.00 (2.00 to 3.00) | 1,800 | 4.00 (3.00 to 4.00) |"
    assert f"| CPU | {FEATURES} | {line}\n" in told
    assert f"| clock | {KEPT} | 80.00 (80.00 to 90.00) | 1.00 (0.80 to 1.50) | 40.00" in told
    assert "Cells of planted, in this order: a: 5 steps, 100 questions; b: 5 steps, 100 questions; c: 5" in told
    assert f"{FEATURES}: 3 of 1,800, 2.0e-05" in told


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["seed=3"], "what cells share is measured on a sweep of two or more, found 1; give a setting several values"),
        (["experiment=bench_probe"], "a sweep of two or more, found 0"),
        (["seed=1,1"], "a sweep of two or more, found 1"),
        (["seed=0,1", "--rounds", "0"], "rounds: must be at least 1, found 0"),
        (["seed=0,1", "train.train_vision=true"], "keep_features: train.train_vision changes what the tower says"),
        (["seed=0,1", "nothing=1"], "nothing"),
        (["seed=0,1", *SHORT, "train.micro_batch=3"], "train.micro_batch 3 does not divide the 4 rows"),
    ],
)
def test_wrong_input_ends_in_one_line(overrides, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cache_sharing.main([*overrides, f"results={tmp_path}"])
    assert ended.value.code == 1
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert said in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_results_folder_that_is_none(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        cache_sharing.main(["seed=0,1", f"results={tmp_path / 'file'}"])
    assert capsys.readouterr().err.strip().endswith("file' cannot be written (Not a directory)")


def test_a_cell_that_fails_is_told_of(sweep, monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise ArithmeticError("no number")

    monkeypatch.setattr(run_cell, "run_cell", fail)
    with pytest.raises(SystemExit):
        cache_sharing.main(sweep)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == "error: small, 2 steps, seed 0 failed: ArithmeticError: no number"
    assert not [path for path in (tmp_path / "results").rglob("*") if path.is_file()]
