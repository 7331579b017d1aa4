"""Sample records from a seeded generator: an ablation of 7 cells x 2 seeds (one failed) and one probed LLaVA."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.report.experiment_specs import ExperimentSpec, load_specs

KINDS = ("place", "count", "colour & shape")
LAYERS = 6
CELLS = (
    ("none", 6, 0),
    ("query", 1, 0),
    ("query", 1, 2),
    ("query", 2, 0),
    ("query", 2, 2),
    ("average", 1, 2),
    ("average", 2, 2),
)
FAILED = ("average", 2, 2, 1)
PAIRS = [["instruction", "vision"], ["response", "vision"], ["response", "instruction"]]


def draw(rng: np.random.Generator, skill: np.ndarray, rate: float) -> str:
    """Draw outcomes: right if an example's noisy difficulty (uniform from 0 to 1) is below `rate`."""
    return "".join("1" if right else "0" for right in skill + rng.normal(0, 0.08, len(skill)) < rate)


def base(identity: str, experiment: str, name: str, config: dict[str, Any]) -> dict[str, Any]:
    provenance = {
        "commit": "1f2e3d4c",
        "code": "9a8b7c6d",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "python": "3.11.7",
    }
    provenance |= {
        "device": "cpu (2 threads)",
        "started": "2026-11-21T10:00:00",
        "seconds": 71.2,
        "train_seconds": 60.0,
    }
    fields = {"schema": 1, "id": identity, "experiment": experiment, "name": name, "status": "finished", "error": None}
    return {**fields, "config": config, "provenance": provenance}


def finished(
    identity: str,
    experiment: str,
    name: str,
    compressor: str,
    size: int,
    layers: int,
    seed: int,
    difficulty: np.ndarray,
) -> dict[str, Any]:
    rng = np.random.default_rng([seed, size, layers, len(compressor)])
    examples = len(difficulty)
    tokens = 36 if compressor == "none" else size**2
    rate = 0.62 + 0.05 * np.log2(tokens) + 0.04 * layers - 0.03 * (compressor == "average")
    config = {
        "seed": seed,
        "model": {"name": "tiny"},
        "compressor": {"name": compressor, "size": size},
        "prefusion": {"layers": layers, "init": "language_model"},
        "train": {"max_steps": 200},
        "data": {"name": "shapes"},
        "probe": {"removal": experiment == "attention"},
    }
    guess = draw(np.random.default_rng(7), np.random.default_rng(8).random(examples), 0.35)
    return base(identity, experiment, name, config) | {
        "model": {
            "label": "LLaVA" if compressor == "none" and layers == 0 else "LLaVA-Mini",
            "layers": LAYERS,
            "visual_tokens": tokens,
            "patches": 36,
            "prefusion_layers": layers,
            "compressor": compressor,
            "parameters": 1_500_000 + 200_000 * layers,
        },
        "cost": {
            "flops": 2.2e6 * (tokens + 14.2) + 4e5 * layers * (50.2 + tokens),
            "cache_bytes": 3072 * (tokens + 14),
            "text_tokens": 14.2,
            "convention": "linear layers and attention, one prompt, no generated token",
        },
        "data": {
            "name": "shapes",
            "split": "test",
            "fingerprint": "c0ffee12",
            "examples": examples,
            "kinds": [KINDS[index % 3] for index in range(examples)],
            "guess": guess,
            "guess_note": "most frequent training answer to the same question text",
        },
        "accuracy": {
            "image": draw(rng, difficulty, rate),
            "blank": draw(rng, rng.random(examples), 0.37),
            "shuffled": draw(rng, rng.random(examples), 0.33),
        },
        "removal": None,
        "onset": None,
        "attention": None,
        "contribution": None,
        "sinks": None,
        "knockout": None,
        "readout": None,
        "lens": None,
        "fusion": None,
    }


def probes(record: dict[str, Any], difficulty: np.ndarray, samples: int) -> dict[str, Any]:
    """Add probes of a model that takes in the image in its first two layers."""
    rng = np.random.default_rng(11)
    onward = [draw(rng, difficulty, rate) for rate in (0.36, 0.58, 0.81, 0.86, 0.87, 0.87)]
    intact = record["accuracy"]["image"]
    inside = [draw(rng, difficulty, rate) for rate in (0.45, 0.66, 0.84, 0.86, 0.87, 0.87)]
    random = [draw(rng, difficulty, rate) for rate in (0.84, 0.85, 0.86, 0.86, 0.87, 0.87)]
    one = [{"layers": [layer], "correct": correct} for layer, correct in enumerate(inside)]
    tails = [{"layers": list(range(k, LAYERS)), "correct": c} for k, c in enumerate([*onward, intact])]
    shape = np.array(
        [[0.5, 0.42, 0.2, 0.12, 0.09, 0.08], [0.3, 0.22, 0.15, 0.1, 0.08, 0.06], [0.3, 0.4, 0.55, 0.62, 0.66, 0.7]]
    )
    mass = np.clip(shape[..., None] + rng.normal(0, 0.1, (3, LAYERS, samples)), 0, 1)
    entropy = (
        np.array([3.2, 3.1, 1.9])[:, None, None] - 0.25 * np.arange(LAYERS)[:, None] + rng.normal(0, 0.3, mass.shape)
    )
    missing: list[Any] = np.round(mass, 4).tolist()
    missing[1][0][0] = None
    windows = [[], *([layer for layer in (end - 1, end) if 0 <= layer < LAYERS] for end in range(LAYERS + 1))]
    blocked = [draw(rng, difficulty, rate) for rate in (0.5, 0.4, 0.62, 0.84, 0.86, 0.87, 0.87)]
    readable = [draw(rng, difficulty[: len(difficulty) - 3], rate) for rate in (0.34, 0.6, 0.78, 0.8, 0.8, 0.79, 0.7)]
    chance = [draw(rng, rng.random(len(difficulty) - 3), 0.3) for _ in readable]
    worded = [draw(rng, difficulty, rate) for rate in (0.05, 0.1, 0.2, 0.4, 0.7, 0.8, 0.87)]
    depth = {"threshold": 0.9, "layers": LAYERS, "level": 0.95, "curve": [0.0] * LAYERS}
    arrived_late = [draw(rng, difficulty, rate) for rate in (0.62, 0.42, 0.38, 0.36, 0.36)]
    onset = {"threshold": 0.1, "layers": LAYERS, "level": 0.95}
    in_layers = np.array([0.0, 0.0, 0.9, 0.9, 0.8, 0.3])[:, None]  # share of samples with a sink
    sinks = (rng.random((LAYERS, samples)) < in_layers).astype(int)
    return record | {
        "removal": {
            "block": 1,
            "inside": one,
            "onward": tails,
            "by_kind": {
                "place": {**depth, "kind": "removal", "depth": 1, "low": 1, "high": 2, "samples": 40},
                "count": {**depth, "kind": "removal", "depth": None, "low": None, "high": None, "samples": 40},
            },
            "random_inside": [{"layers": [layer], "correct": correct} for layer, correct in enumerate(random)],
        },
        "attention": {
            "pairs": PAIRS,
            "samples": samples,
            "queries_note": "mean over the queries that can see the source",
            "mass": missing,
            "entropy": np.round(np.clip(entropy, 0, 3.58), 4).tolist(),
            "uniform_entropy": [3.58, 3.58, 2.4],
            "uniform_mass": [0.62, 0.6, 0.22],
            "control": {
                "name": "same model, random weights",
                "mass": [[0.6] * LAYERS, [0.58] * LAYERS, [0.23] * LAYERS],
                "entropy": [[3.5] * LAYERS, [3.5] * LAYERS, [2.3] * LAYERS],
            },
        },
        "contribution": {
            "pairs": PAIRS,
            "samples": samples,
            "share": np.round(np.clip(shape[..., None] * [0.9] + rng.normal(0, 0.05, mass.shape), 0, 1), 4).tolist(),
            "by_head": np.round(shape[..., None] * np.array([2.0, 1.0, 0.5]), 4).tolist(),
            "control": {
                "name": "same model, random weights",
                "share": [[0.5] * LAYERS, [0.5] * LAYERS, [0.3] * LAYERS],
            },
        },
        "sinks": {
            "targets": ["instruction", "response"],
            "samples": samples,
            "by_attention": sinks.tolist(),
            "by_value": (sinks * [index % 2 for index in range(samples)]).tolist(),
            "mass": [(0.1 * sinks).tolist(), (0.05 * sinks).tolist()],
            "tokens": None,
            "left_out": False,
        },
        "onset": {
            "block": 1,
            "upto": [
                {"layers": list(range(k)), "correct": c}
                for k, c in enumerate([intact, *arrived_late, tails[0]["correct"]])
            ],
            "estimate": {**onset, "onset": 1, "low": 1, "high": 1, "samples": len(difficulty)},
            "by_kind": {
                "place": {**onset, "onset": 2, "low": 1, "high": 2, "samples": 40},
                "count": {**onset, "onset": None, "low": None, "high": None, "samples": 40},
            },
        },
        "knockout": {
            "width": 2,
            "windows": [{"layers": some, "correct": c} for some, c in zip(windows, [intact, *blocked], strict=True)],
        },
        "readout": {
            "label": "the right answer",
            "samples": len(difficulty) - 3,
            "depths": [{"correct": c, "control": d} for c, d in zip(readable, chance, strict=True)],
        },
        "lens": {
            "label": "the right answer's first token",
            "samples": len(difficulty),
            "depths": [{"correct": right, "logprob": -4.5 + 0.7 * k} for k, right in enumerate(worded)],
        },
        "fusion": {
            "knockout": {**depth, "kind": "knockout", "depth": 2, "low": 2, "high": 2, "samples": 120, "reads": (1, 2)},
            "readout": {**depth, "kind": "readout", "depth": None, "low": None, "high": None, "samples": 117},
            "removal": {**depth, "kind": "removal", "depth": 2, "low": 2, "high": 3, "samples": len(difficulty)},
            "attention": {**depth, "kind": "attention", "depth": 5, "low": 5, "high": 5, "samples": samples},
        },
    }


def make_records(examples: int = 120, samples: int = 40) -> list[dict[str, Any]]:
    """Return all records of the sample study, in a fixed order."""
    difficulty = np.random.default_rng(5).random(examples)
    records = []
    for index, (compressor, size, layers) in enumerate(CELLS):
        for seed in (0, 1):
            name = f"tiny | {compressor} {size}x{size}, {layers} pre-fusion layers"
            record = finished(f"{index:015x}{seed}", "ablation", name, compressor, size, layers, seed, difficulty)
            if (compressor, size, layers, seed) == FAILED:
                kept = {key: record[key] for key in ("schema", "id", "experiment", "name", "config", "provenance")}
                record = {**kept, "status": "failed", "error": "RuntimeError: out of memory\n at step 12_000"}
            records.append(record)
    llava = finished("a" * 16, "attention", "tiny | LLaVA", "none", 6, 0, 0, difficulty)
    return [*records, probes(llava, difficulty, samples)]


def write(results: Path, records: list[dict[str, Any]]) -> Path:
    """Write records as `experiments.run` does, one file each, and return the results folder."""
    folder = results / "records"
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        (folder / f"{record['id']}.json").write_text(json.dumps(record))
    return results


@pytest.fixture
def records() -> list[dict[str, Any]]:
    return make_records()


@pytest.fixture
def probed(records: list[dict[str, Any]]) -> dict[str, Any]:
    return records[-1]


@pytest.fixture
def write_records(tmp_path: Path) -> Callable[[list[dict[str, Any]]], Path]:
    return lambda records: write(tmp_path / "results", records)


@pytest.fixture(scope="session")
def make_results() -> Callable[[Path], Path]:
    """Return a function that writes the whole sample study into a results folder."""
    return lambda results: write(results, make_records())


TABLE = """\
# @package _global_
# Table 60: what 100% of {tokens} & layers are worth, a_b? This sentence is no title.
defaults:
  - override /train: short
name: table60_mixed
rows:
  - {label: "LLaVA", compressor.name: none, compressor.size: 6, prefusion.layers: 0, paper: {vqav2: 78.5, gqa: 62.0, mmb: 64.3}}
  - {label: "1 token", compressor.name: query, compressor.size: 1, prefusion.layers: 0, paper: {vqav2: 72.4, gqa: 54.2, mmb: 57.7}}
  - {label: "4 tokens", compressor.name: query, compressor.size: "${scaled:${model.grid},2}", prefusion.layers: 0, paper: {vqav2: 73.0, gqa: 55.0, mmb: 58.0}}
  - {label: "16 tokens", compressor.name: query, compressor.size: "${scaled:${model.grid},4}", prefusion.layers: 0, paper: {vqav2: 74.1, gqa: 55.4, mmb: 59.2}}
  - {label: "64 tokens", compressor.name: query, compressor.size: "${scaled:${model.grid},8}", prefusion.layers: 0, paper: {vqav2: 75.3, gqa: 56.7, mmb: 62.1}}
  - {label: "2 layers", compressor.name: query, compressor.size: 1, prefusion.layers: 2, paper: {vqav2: 76.0, gqa: 57.6, mmb: 63.1}}
  - {label: "2 layers, 50% | average", compressor.name: average, compressor.size: 2, prefusion.layers: 2}
"""


def table_record(
    compressor: str, size: int, layers: int, seed: int, experiment: str = "table60_mixed"
) -> dict[str, Any]:
    """Make a record of a model with 6 x 6 patches; `finished` sets its accuracy."""
    identity = f"{hash_of(compressor, size, layers, seed):016x}"
    name = f"tiny, {size}x{size} {compressor}, {layers} layers"
    difficulty = np.random.default_rng(5).random(120)
    record = finished(identity, experiment, name, compressor, size, layers, seed, difficulty)
    record["config"]["model"]["grid"] = 6
    record["config"]["name"] = experiment
    return record


def hash_of(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def fail(record: dict[str, Any]) -> dict[str, Any]:
    """Turn a record into that of a cell that raised an error."""
    kept = {key: record[key] for key in ("schema", "id", "experiment", "name", "config", "provenance")}
    return {**kept, "status": "failed", "error": "RuntimeError: out of memory\n at step 12_000"}


@pytest.fixture
def table_records() -> list[dict[str, Any]]:
    """Records of the table above.

    Two rows have the same settings, one row was not run, one has a failed and a missing seed, and one failed in all seeds.
    """
    found = [
        table_record(*settings, seed)
        for settings in (("none", 6, 0), ("query", 1, 0), ("query", 2, 0))
        for seed in (0, 1, 2)
    ]
    found += [table_record("query", 1, 2, 0), fail(table_record("query", 1, 2, 1))]
    return [*found, *(fail(table_record("average", 2, 2, seed)) for seed in (0, 1, 2))]


@pytest.fixture
def spec(tmp_path: Path) -> ExperimentSpec:
    (tmp_path / "table60_mixed.yaml").write_text(TABLE)
    (found,) = load_specs(tmp_path)
    return found
