"""Record files: what a well-formed record holds, and how a folder of them is read.

A record is the JSON object that `experiments.run` writes for one cell, kept here as a plain mapping. Outcomes are
strings with one character an example, "1" for a right answer. A file that cannot be used becomes a `Hole`: it is shown
in the report with its reason, and never stops it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float

from experiments.incidental import INCIDENTAL
from experiments.report import latency

SCHEMA = 1
# Settings that came after some records, which were made as if they had had these values.
_YOUNGER = {"train": {"prefusion_learning_rate": None}}
_SEAL = ',"digest":"'

Record: TypeAlias = Mapping[str, Any]

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


@dataclass(frozen=True)
class Hole:
    """Something that should be in the report and is not, with the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Records:
    """What a folder of records holds.

    `superseded` are older records of a configuration and seed that a newer record has replaced (the code or the data
    changed in between); they are named in the report and used nowhere.
    """

    finished: tuple[Record, ...]
    failed: tuple[Record, ...]
    unreadable: tuple[Hole, ...]
    superseded: tuple[Hole, ...]

    @property
    def holes(self) -> tuple[Hole, ...]:
        """All that is missing: failed cells first, then files that could not be read."""
        return (*(Hole(describe(record), failure(record)) for record in self.failed), *self.unreadable)


def load(folder: Path) -> Records:
    """Read every `*.json` in `folder`; the records come in the order of their identities. A latency that was measured of
    a record's model, and lies beside `folder`, is in its `cost`.

    Of records whose configurations differ in nothing but `INCIDENTAL` the newest counts.

    Raises:
        FileNotFoundError: if `folder` does not exist or holds no `*.json` file.
        ValueError: if what lies beside it as latencies is none.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise FileNotFoundError(f"no records in {folder}: make some with `python -m experiments.run`")
    latencies = latency.load(folder.parent)
    newest: dict[str, Record] = {}
    unreadable, superseded = [], []
    for path in paths:
        try:
            record = read(path)
        except (OSError, ValueError) as error:
            unreadable.append(Hole(path.name, str(error)))
            continue
        if record.get("cost") and (timed := latencies.get(latency.timed_part(record["config"]))):
            record = {**record, "cost": {**record["cost"], **timed}}
        key = configuration(record["config"])
        other = newest.get(key)
        if other is not None:
            older, record = sorted((other, record), key=_age)
            superseded.append(Hole(f"{describe(older)} ({older['id']})", f"replaced by the newer {record['id']}"))
        newest[key] = record
    kept = sorted(newest.values(), key=lambda record: record["id"])
    return Records(
        finished=tuple(record for record in kept if record["status"] == "finished"),
        failed=tuple(record for record in kept if record["status"] == "failed"),
        unreadable=tuple(unreadable),
        superseded=tuple(sorted(superseded, key=lambda hole: hole.name)),
    )


def of_attention(record: Record) -> bool:
    """Whether a record is of an experiment that probes one model and trains none: `attention`, `smol_attention`."""
    return str(record["experiment"]).rpartition("_")[2] == "attention"


def chosen(records: Records, some: Iterable[Record]) -> Records:
    """Some of the records alone; files that could not be read stay named."""
    ids = {record["id"] for record in some}
    finished, failed = (tuple(r for r in part if r["id"] in ids) for part in (records.finished, records.failed))
    return replace(records, finished=finished, failed=failed, superseded=())


def sealed(body: str) -> str:
    """A record file's text, of a JSON object's: with a digest at its end that tells when it has been changed since."""
    return f'{body[:-1]}{_SEAL}{hashlib.sha256(body.encode()).hexdigest()}"}}\n'


def read(path: Path) -> Record:
    """Read and check one record file. Raises ValueError with one line that says what is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8")
        record = json.loads(text)
        body, seal, _ = text.rpartition(_SEAL)
        if seal and text != sealed(f"{body}}}"):
            raise ValueError("changed since it was written; remove it and run its cell again")
    except UnicodeDecodeError:
        raise ValueError("not a text file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON (truncated?): {error.msg} at line {error.lineno}") from None
    check(record)
    for part, settings in _YOUNGER.items():
        if isinstance(said := record["config"].get(part), dict):
            record["config"][part] = settings | said
    return record


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


def outcomes(text: str) -> np.ndarray:
    """One character an example to one 0 or 1 an example, uint8."""
    return np.frombuffer(text.encode("ascii"), dtype=np.uint8) - ord("0")


def percent_right(runs: Sequence[Mapping[str, Any]]) -> Float[np.ndarray, "runs examples"]:
    """The outcomes of several runs over the same examples, 0 or 100."""
    return 100.0 * np.stack([outcomes(run["correct"]) for run in runs])


def seed(record: Record) -> int | None:
    """The training seed of a record, None where its configuration has none."""
    return record["config"].get("seed")


def describe(record: Record) -> str:
    """A record's label with its seed, for people."""
    suffix = f"seed {seed(record)}"
    return record["name"] if seed(record) is None or suffix in record["name"] else f"{record['name']}, {suffix}"


def failure(record: Record) -> str:
    """Why a failed record failed, in one line."""
    return "failed: " + " ".join((record.get("error") or "no reason recorded").split())


def first_layers(record: Record) -> list[int]:
    """How many first layers still see the visual tokens, for each entry of `removal.onward`."""
    return [record["model"]["layers"] - len(run["layers"]) for run in record["removal"]["onward"]]


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A nested configuration as dotted keys with their values."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def configuration(config: Mapping[str, Any], *without: str) -> str:
    """A configuration as text that is equal where nothing differs but `INCIDENTAL` and the keys `without`."""
    return json.dumps(
        {key: value for key, value in config.items() if key not in (*INCIDENTAL, *without)}, sort_keys=True
    )


def started(record: Record) -> str:
    """When a record's run began (ISO 8601), "" where it does not say."""
    return (record.get("provenance") or {}).get("started") or ""


def _age(record: Record) -> tuple[str, str]:
    return started(record), record["id"]


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
