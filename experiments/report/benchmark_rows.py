"""The rows of the table over benchmarks: models and compressors, with the scores of all records that belong to each."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.config.identity import IGNORED_SETTINGS
from experiments.config.plain import flatten_config
from experiments.records.benchmarks import is_benchmark_record
from experiments.records.views import Record, configuration_key, record_seed, start_time
from experiments.report.file_versions import data_versions

_REDUCING = ("compressor", "prefusion", "reduction", "budget", "tiles")
"""Settings in which a reduced model differs from the uncut one."""


@dataclass(frozen=True)
class BenchmarkRow:
    """One model on all the benchmarks that it answered.

    Attributes:
        label: Its name, with the settings that set it apart from rows of the same name.
        family: A text that is equal for rows that differ in their reduction alone.
        records: Its records: several seeds, and several lists of tasks.
        left_out: Identities of records that are not counted, because the weights have changed since.
    """

    label: str
    family: str
    records: tuple[Record, ...]
    left_out: tuple[str, ...] = field(default=())

    @property
    def seeds(self) -> tuple[Any, ...]:
        """The seeds, in order."""
        return tuple(sorted({record_seed(record) for record in self.records}, key=str))

    @property
    def is_uncut(self) -> bool:
        """Whether the language model gets all visual tokens, and nothing comes before it."""
        model = self.records[0]["model"]
        return model["compressor"] == "none" and model["prefusion_layers"] == 0

    @property
    def tasks(self) -> dict[str, dict[Any, Mapping[str, Any]]]:
        """The parts of each task by the seed that answered it. Of several records of a seed the newest counts."""
        parts: dict[str, dict[Any, Mapping[str, Any]]] = defaultdict(dict)
        for record in sorted(self.records, key=start_time):
            for name, part in record["benchmarks"]["tasks"].items():
                parts[name][record_seed(record)] = part
        return {name: {seed: by_seed[seed] for seed in sorted(by_seed, key=str)} for name, by_seed in parts.items()}

    @property
    def weights(self) -> frozenset[str]:
        """Hashes of the weights of all seeds."""
        return frozenset(record["benchmarks"]["weights"] for record in self.records)


def benchmark_rows(records: Iterable[Record]) -> tuple[BenchmarkRow, ...]:
    """Return the rows of all records with benchmarks: uncut models first, then by name.

    Records belong to one row if they differ in nothing but the seed and the list of tasks.

    Args:
        records: Finished records.
    """
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if is_benchmark_record(record):
            groups[_key(record, "seed")].append(record)
    rows = []
    for members in groups.values():
        counted, left_out = _newest_weights(members)
        label = counted[0]["name"].removesuffix(f", seed {record_seed(counted[0])}")
        rows.append(BenchmarkRow(label, _key(counted[0], "seed", *_REDUCING), counted, left_out))
    rows.sort(key=lambda row: (not row.is_uncut, row.label, row.records[0]["id"]))
    return tuple(
        BenchmarkRow(label, row.family, row.records, row.left_out)
        for label, row in zip(_distinct_labels(rows), rows, strict=True)
    )


def uncut_row(row: BenchmarkRow, rows: Sequence[BenchmarkRow]) -> BenchmarkRow | None:
    """Return the row of the uncut model with the same weights, None if there is none.

    A compressor adds weights of its own, so its row is one of the same model, trained alike. A row that differs from the
    uncut one in its reduction alone must also have the same hash of weights.

    Args:
        row: Any row.
        rows: All rows.
    """
    for other in rows:
        if other.is_uncut and other.family == row.family:
            adds_weights = row.records[0]["model"]["label"] != other.records[0]["model"]["label"]
            return other if adds_weights or row.weights <= other.weights else None
    return None


def _key(record: Record, *without: str) -> str:
    config = record["config"]
    data = {name: value for name, value in config["data"].items() if name != "tasks"}
    return json.dumps([configuration_key({**config, "data": data}, *without), record["data"]["fingerprint"]])


def _newest_weights(records: Sequence[Record]) -> tuple[tuple[Record, ...], tuple[str, ...]]:
    """Return the records whose weights are those of the newest record of their seed, and the identities of the others."""
    newest = {record_seed(record): record["benchmarks"]["weights"] for record in sorted(records, key=start_time)}
    counted = [r for r in records if r["benchmarks"]["weights"] == newest[record_seed(r)]]
    counted.sort(key=lambda record: (str(record_seed(record)), record["id"]))
    return tuple(counted), tuple(sorted(record["id"] for record in records if record not in counted))


def _distinct_labels(rows: Sequence[BenchmarkRow]) -> list[str]:
    """Return the rows' labels. Rows with the same label get the settings, or the data, in which these differ."""
    labels = []
    for row in rows:
        alike = [other for other in rows if other.label == row.label]
        configs = [dict(flatten_config(other.records[0]["config"])) for other in alike]
        own = dict(flatten_config(row.records[0]["config"]))
        differing = [
            key
            for key in own
            if key not in ("seed", "data.tasks", *IGNORED_SETTINGS)
            and len({str(config.get(key)) for config in configs}) > 1
        ]
        settings = ", ".join(f"{key}={own[key]}" for key in differing)
        labels.append(f"{row.label}, {settings}" if settings else row.label)
    data = data_versions(labels, [row.records[0] for row in rows])
    return [", ".join(filter(None, texts)) for texts in zip(labels, data, strict=True)]
