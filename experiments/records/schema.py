"""TODO"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.records.views import Record, first_layers

SCHEMA = 1


_ALWAYS: dict[str, Any] = {"id": str, "experiment": str, "name": str, "config": dict}


_FINISHED: dict[str, Any] = {
    "model.label": str,
    "model.layers": int,
    "model.visual_tokens": int,
    "model.prefusion_layers": int,
    "model.compressor": str,
    "model.parameters": (int, float),
    "data.name": str,
    "data.fingerprint": str,
    "data.examples": int,
    "data.kinds": list,
    "accuracy.image": str,
    "provenance": dict,
}


_FUSION: dict[str, Any] = {
    "depth": (int, type(None)),
    "low": (int, float, type(None)),
    "high": (int, float, type(None)),
    "layers": int,
}


def check(record: Any) -> None:
    """Raise ValueError, in one line, for what is missing or inconsistent in a record."""
    if not isinstance(record, dict):
        raise ValueError(f"a record is a JSON object, this is a {type(record).__name__}")
    if record.get("schema") != SCHEMA:
        raise ValueError(f"schema {record.get('schema')!r}, this report reads schema {SCHEMA}")
    for path, kind in _ALWAYS.items():
        _field(record, path, kind)
    if record.get("status") not in ("finished", "failed"):
        raise ValueError(f"status is {record.get('status')!r}, not 'finished' or 'failed'")
    if record["status"] == "failed":
        return
    for path, kind in _FINISHED.items():
        _field(record, path, kind)
    if record.get("cost") is not None:
        _field(record, "cost.flops", (int, float))
        if "cache_bytes" in record["cost"]:  # older records lack it
            _field(record, "cost.cache_bytes", (int, float))
    examples = record["data"]["examples"]
    if len(record["data"]["kinds"]) != examples:
        raise ValueError(f"data.kinds has {len(record['data']['kinds'])} entries for {examples} examples")
    if record["data"].get("guess") is not None:
        _check_outcomes(record["data"]["guess"], "data.guess", examples)
    for view, outcomes in record["accuracy"].items():
        if outcomes is not None:
            _check_outcomes(outcomes, f"accuracy.{view}", examples)
    if record.get("removal") is not None:
        _check_removal(record)
    if record.get("attention") is not None:
        _check_attention(record)
    if record.get("knockout") is not None:
        _check_knockout(record)
    if record.get("readout") is not None:
        _check_readout(record)
    if record.get("lens") is not None:
        _check_lens(record)
    for kind, depth in (record.get("fusion") or {}).items():
        if depth is not None:
            for key, type_ in _FUSION.items():
                _field(depth, key, type_, f"fusion.{kind}.{key}")
            if depth["depth"] is not None and (depth["low"] is None or depth["high"] is None):
                raise ValueError(f"fusion.{kind} has a depth but no interval")


def _field(mapping: Any, path: str, kind: Any, shown: str | None = None) -> Any:
    value = mapping
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            raise ValueError(f"{shown or path} is missing")
        value = value[key]
    # JSON's true would pass for the integer 1.
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{shown or path} is {value!r:.40}, of the wrong type")
    return value


def _check_outcomes(text: Any, path: str, examples: int) -> None:
    if not isinstance(text, str) or set(text) - {"0", "1"}:
        raise ValueError(f"{path} is not a string of 0 and 1")
    if len(text) != examples:
        raise ValueError(f"{path} has {len(text)} outcomes for {examples} examples")


def _check_removal(record: Record) -> None:
    layers, examples = record["model"]["layers"], record["data"]["examples"]
    for part in ("inside", "onward", "random_inside"):
        runs = record["removal"].get(part)
        if runs is None and part == "random_inside":
            continue
        if not isinstance(runs, list) or not runs:
            raise ValueError(f"removal.{part} is missing or empty")
        for index, run in enumerate(runs):
            _field(run, "layers", list, f"removal.{part}[{index}].layers")
            _check_outcomes(run.get("correct"), f"removal.{part}[{index}].correct", examples)
            if not set(run["layers"]) <= set(range(layers)):
                raise ValueError(f"removal.{part}[{index}].layers goes beyond the model's {layers} layers")
        if part != "onward" and not all(run["layers"] for run in runs):
            raise ValueError(f"removal.{part} has a block without layers")
    seen = first_layers(record)
    tails = [list(range(count, layers)) for count in seen]
    if tails != [run["layers"] for run in record["removal"]["onward"]] or sorted({0, layers, *seen}) != seen:
        raise ValueError(f"removal.onward does not go from all {layers} layers to none, each time from a layer onward")


def _check_knockout(record: Record) -> None:
    layers, examples = record["model"]["layers"], record["data"]["examples"]
    width = _field(record, "knockout.width", int)
    windows = [list(range(max(end - width, 0), min(end, layers))) for end in range(1, layers + width)]
    runs = _field(record, "knockout.windows", list)
    if [run.get("layers") for run in runs] != [[], *windows]:
        raise ValueError(f"knockout.windows are not the intact model and all windows of {width} of {layers} layers")
    for index, run in enumerate(runs):
        _check_outcomes(run.get("correct"), f"knockout.windows[{index}].correct", examples)


def _check_readout(record: Record) -> None:
    _check_depths(record, "readout", ("correct", "control"))


def _check_lens(record: Record) -> None:
    _check_depths(record, "lens", ("correct",))
    for index, run in enumerate(record["lens"]["depths"]):
        _field(run, "logprob", (int, float), f"lens.depths[{index}].logprob")


def _check_depths(record: Record, part: str, keys: Sequence[str]) -> None:
    """What is read after 0, 1, ... all layers, with one outcome a sample under each of `keys`."""
    depths, samples = _field(record, f"{part}.depths", list), _field(record, f"{part}.samples", int)
    if len(depths) != record["model"]["layers"] + 1:
        raise ValueError(f"{part}.depths has {len(depths)} entries for {record['model']['layers']} layers and none")
    for index, run in enumerate(depths):
        for key in keys:
            _check_outcomes(run.get(key), f"{part}.depths[{index}].{key}", samples)


def _check_attention(record: Record) -> None:
    attention, layers = record["attention"], record["model"]["layers"]
    pairs = len(_field(attention, "pairs", list, "attention.pairs"))
    samples = _field(attention, "samples", int, "attention.samples")
    wanted: dict[str, tuple[int, ...]] = {"mass": (pairs, layers, samples), "entropy": (pairs, layers, samples)}
    arrays = {f"attention.{key}": (attention.get(key), shape) for key, shape in wanted.items()}
    for key in ("uniform_mass", "uniform_entropy"):
        arrays[f"attention.{key}"] = (attention.get(key), (pairs,))
    for key in ("mass", "entropy"):
        arrays[f"attention.control.{key}"] = ((attention.get("control") or {}).get(key), (pairs, layers))
    for path, (values, shape) in arrays.items():
        if values is None and path not in ("attention.mass", "attention.entropy"):
            continue
        try:
            found = np.asarray(values, dtype=float).shape
        except (TypeError, ValueError):
            raise ValueError(f"{path} is not a full array of numbers") from None
        if found != shape:
            raise ValueError(f"{path} has shape {found}, expected {shape}")
