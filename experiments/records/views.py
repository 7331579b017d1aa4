"""What reports read off a record.

A record is the JSON object that `experiments.run` writes for one cell, as nested mappings
(`experiments.records.schema`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, UInt8

from experiments.config.identity import IGNORED_SETTINGS

Record: TypeAlias = Mapping[str, Any]


def is_attention_experiment(record: Record) -> bool:
    """Return whether the record's experiment records attention of one model: `attention`, `smol_attention`."""
    return _kind_of_experiment(record) == "attention"


def analyses_one_model(record: Record) -> bool:
    """Return whether the record's experiment analyses one model and trains none: also `swaps`, of minimal pairs."""
    return _kind_of_experiment(record) in ("attention", "swaps")


def parse_outcomes(text: str) -> UInt8[np.ndarray, " examples"]:
    """Return outcomes as 0 and 1.

    Args:
        text: One character per example, "1" for a right answer.

    Example:
        >>> parse_outcomes("0110")
        array([0, 1, 1, 0], dtype=uint8)
    """
    return np.frombuffer(text.encode("ascii"), dtype=np.uint8) - ord("0")


def percent_right(runs: Sequence[Mapping[str, Any]]) -> Float[np.ndarray, "runs examples"]:
    """Return the outcomes of several runs over the same examples, as 0 or 100."""
    return 100.0 * np.stack([parse_outcomes(run["correct"]) for run in runs])


def record_seed(record: Record) -> int | None:
    """Return the seed of a record, None if its configuration has none."""
    return record["config"].get("seed")


def model_files(record: Record) -> Mapping[str, str]:
    """Return the hash of the model's files by setting; empty for models of the hub, older records and failed ones."""
    return (record.get("model") or {}).get("files") or {}


def record_label(record: Record) -> str:
    """Return the name of a record with its seed."""
    suffix = f"seed {record_seed(record)}"
    return record["name"] if record_seed(record) is None or suffix in record["name"] else f"{record['name']}, {suffix}"


def mean_visual_tokens(records: Sequence[Record]) -> float:
    """Return how many visual tokens the language model reads, as a mean over its layers and over records."""
    models = [record["model"] for record in records]
    return float(np.mean([model.get("visual_tokens_mean", model["visual_tokens"]) for model in models]))


def failure_reason(record: Record) -> str:
    """Return in one line why a failed record failed."""
    return "failed: " + " ".join((record.get("error") or "no reason recorded").split())


def layers_with_vision(record: Record) -> list[int]:
    """Return the number of first layers that have visual tokens, for each entry of `removal.onward`."""
    return [record["model"]["layers"] - len(run["layers"]) for run in record["removal"]["onward"]]


def window_middles(windows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the middle layer of each window of a knock-out, counted from 1.

    Example:
        >>> window_middles([{"layers": [0]}, {"layers": [0, 1]}])
        [1.0, 1.5]
    """
    return [(min(run["layers"]) + max(run["layers"])) / 2 + 1 for run in windows]


def configuration_key(config: Mapping[str, Any], *without: str) -> str:
    """Return a text that is equal for configurations that differ in nothing but some settings.

    Args:
        config: A record's configuration.
        without: Settings to leave out, beside `IGNORED_SETTINGS`.
    """
    left_out = (*IGNORED_SETTINGS, *without)
    return json.dumps({key: value for key, value in config.items() if key not in left_out}, sort_keys=True)


def _kind_of_experiment(record: Record) -> str:
    return str(record["experiment"]).rpartition("_")[2]


def start_time(record: Record) -> str:
    """Return when a record's run began (ISO 8601), "" if it is not recorded."""
    return (record.get("provenance") or {}).get("started") or ""
