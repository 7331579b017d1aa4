"""The documents of a record's benchmarks as a frame: scores, answers, and the depths that analyses by layer give each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.records.sample_depths import (
    attention_depths,
    image_attention,
    knockout_depths,
    onset_layers,
    outcomes_with_and_without_image,
    removal_depths,
)
from experiments.records.views import Record

_DEPTHS = {
    "removal_depth": ("removal", removal_depths),
    "knockout_depth": ("knockout", knockout_depths),
    "onset": ("onset", onset_layers),
    "attention_depth": ("attention", attention_depths),
}
_Key = tuple[str, int]


def benchmark_samples(record: Record, results: Path) -> pd.DataFrame:
    """Return the documents of a record's benchmarks, with their scores and depths.

    Scores come from the files of answers, depths from the record. They are joined by task and document.

    Args:
        record: A finished record with benchmarks.
        results: The results folder, which holds the files of answers.

    Returns:
        One row for each document, as `Report.frame` describes them.

    Raises:
        OSError: If a file of answers cannot be read.
        ValueError: If a document stands twice, or has a score without an analysis, or the reverse.
    """
    frames = []
    for name, task in record["benchmarks"]["tasks"].items():
        lines = [json.loads(line) for line in (results / task["file"]).read_text(encoding="utf-8").splitlines()[1:]]
        keys = _unique((line["task"], line["doc_id"]) for line in lines)
        frame = pd.DataFrame(
            {
                "benchmark": name,
                "task": [line["task"] for line in lines],
                "doc_id": [line["doc_id"] for line in lines],
                "answer": [line["answer"] for line in lines],
                "target": [line["target"] for line in lines],
                **_score_columns([line["scores"] for line in lines]),
            }
        )
        frames.append(pd.concat([frame, _probe_columns(task.get("probes"), keys)], axis=1))
    return pd.concat(frames, ignore_index=True)


def _score_columns(scores: list[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return a column for each metric. Of a mapping the number under "score" counts, if it has one."""
    metrics = dict.fromkeys(metric for by_metric in scores for metric in by_metric)
    values = {metric: [by_metric.get(metric, np.nan) for by_metric in scores] for metric in metrics}
    return {
        f"score_{metric}": [value.get("score", value) if isinstance(value, dict) else value for value in column]
        for metric, column in values.items()
    }


def _probe_columns(probes: Mapping[str, Any] | None, keys: list[_Key]) -> pd.DataFrame:
    """Return the columns of the analyses by layer, in the order of the documents `keys`."""
    measured = (
        {} if probes is None else {name: probes.get(name) for name in ("removal", "onset", "knockout", "attention")}
    )
    documents = [] if probes is None else [*probes["documents"], *probes["without_image"]]
    analysed = _unique((document["task"], document["doc_id"]) for document in documents)
    if probes is not None and (unmatched := set(keys) ^ set(analysed)):
        task, doc_id = min(unmatched)
        has, lacks = ("a score", "analysis") if (task, doc_id) in keys else ("an analysis", "score")
        raise ValueError(f"task {task}: document {doc_id} has {has} and no {lacks}; run the cell again")
    image, no_image = outcomes_with_and_without_image(measured)
    columns: dict[str, tuple[Iterable[Any], str]] = {
        "analysed_answer": ([document["answer"] for document in documents], "object"),
        "image": ([] if image is None else image, "float"),
        "no_image": ([] if no_image is None else no_image, "float"),
    }
    for column, (name, depths) in _DEPTHS.items():
        part = measured.get(name)
        columns[column] = (depths(part) if part else [], "Int64")
    attention = measured.get("attention")
    columns["attention"] = (zip(*image_attention(attention), strict=True) if attention else [], "object")
    # Attention may be recorded on the first documents alone, and documents of text alone have an answer alone. pandas fills the
    # rest of their columns with missing values.
    table = pd.DataFrame({column: pd.Series(list(values), dtype=dtype) for column, (values, dtype) in columns.items()})
    row_of = {key: row for row, key in enumerate(analysed)}
    return table.reindex([row_of.get(key, -1) for key in keys]).reset_index(drop=True)


def _unique(keys: Iterable[_Key]) -> list[_Key]:
    """Return the keys as a list, and raise ValueError if one stands twice."""
    listed = list(keys)
    if twice := [key for key, count in Counter(listed).items() if count > 1]:
        task, doc_id = twice[0]
        raise ValueError(f"task {task}: document {doc_id} stands twice; a task with several filters has no frame")
    return listed
