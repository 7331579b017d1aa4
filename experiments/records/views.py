"""Record files: what a well-formed record holds, and how a folder of them is read.

A record is the JSON object that `experiments.run` writes for one cell, kept here as a plain mapping. Outcomes are
strings with one character an example, "1" for a right answer. A file that cannot be used becomes a `Hole`: it is shown
in the report with its reason, and never stops it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float

from experiments.config.identity import INCIDENTAL

Record: TypeAlias = Mapping[str, Any]


def of_attention(record: Record) -> bool:
    """Whether a record is of an experiment that probes one model and trains none: `attention`, `smol_attention`."""
    return str(record["experiment"]).rpartition("_")[2] == "attention"


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
