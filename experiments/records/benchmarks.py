"""The benchmarks in a record, and the files of answers beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from experiments.files import file_sha256
from experiments.records.layer_parts import (
    AttentionPart,
    ContributionPart,
    Depth,
    KnockoutPart,
    OnsetPart,
    RemovalPart,
    SinksPart,
)
from experiments.records.part import Part

ANSWERS_FOLDER = "answers"
"""Folder in a results folder with one file for each task that a model has answered."""

Number = float


class BenchmarkScore(Part):
    """One score of a task, in the task's own unit."""

    value: Number
    standard_error: Number | None = Field(
        None, description="of the mean over documents, where the score is that mean; null for other scores"
    )
    higher_is_better: bool | None = None

    @model_validator(mode="after")
    def _finite(self) -> BenchmarkScore:
        if not math.isfinite(self.value):
            raise ValueError(f"must be a finite number, found {self.value}")
        return self


class BenchmarkCost(Part):
    """The cost of the first prompt of a task, with its right answer."""

    flops: Number = Field(description="floating-point operations of the prefill")
    cache_bytes: Number = Field(description="bytes of keys and values that it leaves in the cache")
    visual_tokens: int = Field(description="visual tokens that enter the language model")
    visual_tokens_mean: Number = Field(description="the mean over its layers, where some are dropped")


class ProbedDocument(Part):
    """One document that was analysed by layer."""

    task: str = Field(description="its task, one of a group's")
    doc_id: int
    answer: str = Field(description="the answer whose outcome counts, from the task's right answers")


class BenchmarkProbes(Part):
    """Analyses by layer, with one outcome for each document that has an image or a video."""

    documents: list[ProbedDocument] = Field(min_length=1, description="in the order of the outcomes")
    without_image: list[ProbedDocument] = Field([], description="documents of text alone, which are not analysed")
    attention: AttentionPart | None = None
    contribution: ContributionPart | None = None
    sinks: SinksPart | None = None
    removal: RemovalPart | None = None
    onset: OnsetPart | None = None
    knockout: KnockoutPart | None = None
    fusion: dict[str, Depth | None] | None = Field(None, description="fusion depth by curve")


class BenchmarkTask(Part):
    """One task or group of lmms-eval."""

    scores: dict[str, dict[str, BenchmarkScore]] = Field(
        description="by task, then by metric; a group's own scores are under its name"
    )
    documents: int = Field(ge=1, description="documents that were answered, over all tasks of a group")
    documents_hash: str = Field(description="hash of their texts")
    prompt: str = Field(description="the first prompt, without the chat template")
    versions: dict[str, str] = Field(description="version by task, as its file names it")
    settings_hash: str = Field(description="hash of the settings of its tasks, as lmms-eval resolved them")
    cost: BenchmarkCost
    probes: BenchmarkProbes | None = None
    file: str = Field(description="answers and scores by document, inside the results folder")
    sha256: str = Field(description="hash of that file")


class Judge(Part):
    """The judge of open answers."""

    address: str = Field(description="its address, without key")
    model: str | None = Field(None, description="MODEL_VERSION; null if the task's own default was used")


class BenchmarksPart(Part):
    """Scores of public benchmarks by lmms-eval."""

    lmms_eval: str = Field(description="version of lmms-eval")
    weights: str = Field(description="hash of the model's weights")
    judge: Judge | None = None
    tasks: dict[str, BenchmarkTask] = Field(min_length=1, description="by the names that data.tasks lists")


def is_benchmark_record(record: Mapping[str, Any]) -> bool:
    """Return whether a record's cell has answered public benchmarks, also if it failed.

    Example:
        >>> is_benchmark_record({"config": {"data": {"name": "lmms", "tasks": ["pope"]}}})
        True
    """
    return "tasks" in (record["config"].get("data") or {})


def check_answer_files(record: Mapping[str, Any], results: Path) -> None:
    """Check that the answers of a record are in its results folder and have not changed.

    Args:
        record: A record; one without benchmarks has no such files.
        results: The results folder.

    Raises:
        ValueError: If a file is missing or has another hash than the record, in one line.
    """
    for name, task in ((record.get("benchmarks") or {}).get("tasks") or {}).items():
        file = results / task["file"]
        try:
            found = file_sha256(file)
        except OSError as error:
            raise ValueError(
                f"benchmarks.tasks.{name}.file: '{file}' cannot be read ({error.strerror}); run the cell again"
            ) from None
        if found != task["sha256"]:
            raise ValueError(
                f"benchmarks.tasks.{name}.file: '{file}' changed since the record was written; its hash is {found[:16]}, "
                f"not {task['sha256'][:16]}; remove it and run the cell again"
            )
