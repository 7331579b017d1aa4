"""The benchmarks of a cell: each task is answered once, and its answers are kept beside the records."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from transformers import PreTrainedModel, ProcessorMixin

from experiments.cell import Cell
from experiments.config.data_schema import LmmsData
from experiments.config.identity import IGNORED_SETTINGS
from experiments.config.schema import Config
from experiments.data.length_limit import LengthLimit
from experiments.evaluation.flops import forward_cost
from experiments.evaluation.questions import EncodedQuestions
from experiments.files import file_sha256
from experiments.lmms_eval_model.answer_files import answer_file, digest, document_line, read_result, write_answers
from experiments.lmms_eval_model.benchmark_probes import check_document_probes, measure_benchmark_probes
from experiments.lmms_eval_model.evaluate import check_tasks, run_tasks
from experiments.lmms_eval_model.judge import DEFAULT_ADDRESS, JUDGED_TASKS
from experiments.lmms_eval_model.request_samples import VideoSampling
from experiments.lmms_eval_model.weights import weights_hash
from experiments.models.model_files import model_files_digest
from experiments.models.token_reduction import token_dropper_for_inference
from experiments.provenance import code_version
from experiments.records.benchmarks import BenchmarkCost

SUBMISSIONS_FOLDER = "submissions"
"""Folder in a results folder for the files that some tasks write to be submitted."""
_COST_ANSWER = "yes"
log = logging.getLogger(__name__)


def check_benchmarks(config: Config) -> None:
    """Check, before any model is loaded, that a cell's benchmarks can run, and set HF_HOME if it is not set.

    Args:
        config: A configuration with data=lmms.

    Raises:
        ValueError: As `check_tasks`; or if the cell has a probe that benchmarks lack, or several processes would run it.
    """
    assert isinstance(config.data, LmmsData)
    check_document_probes(config.probe)
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(
            f"data.tasks: a cell answers its benchmarks in one process, found WORLD_SIZE={processes}; run the tasks as a "
            "sweep, data.tasks=[gqa],[pope], or with lmms-eval's own command"
        )
    if not os.environ.get("HF_HOME"):
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        os.environ["HF_HOME"] = str(Path(cache) / "huggingface")  # where the model hub's library looks too
    log.info("HF_HOME=%s", os.environ["HF_HOME"])
    check_tasks(config.data.tasks, config.data.test_samples or None, [Path(folder) for folder in config.data.include])


def run_benchmarks(model: PreTrainedModel, processor: ProcessorMixin, cell: Cell) -> dict[str, Any]:
    """Answer the benchmarks of a cell, and return the `benchmarks` part of its record.

    Tasks run one after the other, and the answers of each are written as soon as they are scored. A task whose answers
    were written before is not run again if the weights, the settings, the code and lmms-eval are the same.

    Args:
        model: The cell's model, on its device.
        processor: Its processor.
        cell: The cell.

    Raises:
        ValueError: If a task has no score.
    """
    from experiments.lmms_eval_model.model import BuiltModel

    config, data = cell.config, cell.config.data
    assert isinstance(data, LmmsData)
    results, weights, harness = Path(config.results), weights_hash(model), version("lmms-eval")
    built = BuiltModel(
        model,
        processor,
        token_dropper_for_inference(config),
        config.batch_size,
        VideoSampling(data.frames, data.max_frames),
    )
    judge = _judge(data.tasks)
    tasks = {}
    for number, task in enumerate(data.tasks, 1):
        key = {
            "task": task,
            "weights": weights,
            "model_files": model_files_digest(config.model),  # its processor and chat template too
            "settings": _relevant_settings(cell.resolved),
            "data": cell.data.fingerprint,
            "code": code_version(),
            "judge": judge if task in JUDGED_TASKS else None,
        }
        file = answer_file(task, key)
        result = read_result(results / file, key)
        if result is None:
            log.info("benchmark %d of %d: %s", number, len(data.tasks), task)
            result = _run_task(built, task, config, results / file, key)
        else:
            log.info("benchmark %d of %d: %s was answered before (%s)", number, len(data.tasks), task, file)
        tasks[task] = {**result, "file": file.as_posix(), "sha256": file_sha256(results / file)}
    return {"lmms_eval": harness, "weights": weights, "judge": judge, "tasks": tasks}


def score_lines(part: Mapping[str, Any]) -> list[str]:
    """Return the scores of a `benchmarks` part, one line each, for the terminal.

    Args:
        part: The part of a record.

    Example:
        >>> score_lines({"tasks": {"gqa": {"scores": {"gqa": {"exact_match": {"value": 0.5, "standard_error": 0.1}}}}}})
        ['gqa exact_match 0.5 (standard error 0.1)']
    """
    lines = []
    for task in part["tasks"].values():
        for name, scores in task["scores"].items():
            for metric, score in scores.items():
                error = score.get("standard_error")
                note = "" if error is None else f" (standard error {error:.4g})"
                lines.append(f"{name} {metric} {score['value']:.6g}{note}")
    return lines


def _run_task(built: Any, task: str, config: Config, path: Path, key: Mapping[str, Any]) -> dict[str, Any]:
    """Answer one task or group, write its file, and return the result that the file holds."""
    data = config.data
    assert isinstance(data, LmmsData)
    include = [Path(folder) for folder in data.include]
    submissions = Path(config.results) / SUBMISSIONS_FOLDER
    run = run_tasks(built, [task], submissions, data.test_samples or None, include)
    scores = {name: task_scores(run, name) for name in run["results"]}
    for name in run["configs"]:
        if not run["samples"].get(name) or not scores.get(name):
            raise ValueError(f"data.tasks: {name} gave no score; what it wrote to be submitted is in {submissions}")
    logged = [(name, entry) for name, entries in run["samples"].items() for entry in entries]
    first_task, first = logged[0]
    settings = {name: run["configs"][name] for name in run["samples"]}
    result = {
        "scores": {name: found for name, found in scores.items() if found},
        "documents": len({(name, entry["doc_id"]) for name, entry in logged}),
        "documents_hash": digest([[name, entry["doc_id"], entry["doc_hash"]] for name, entry in logged])[:16],
        "prompt": document_line(first_task, first, ())["prompt"],
        "versions": {name: _task_version(each) for name, each in settings.items()},
        "settings_hash": digest(settings)[:16],
        # `built.requests` are the requests of this task, and `built.sample` makes samples of them.
        "cost": _first_cost(built, config),
        "probes": measure_benchmark_probes(built, logged, config),
    }
    write_answers(path, key, result, (document_line(name, entry, scores[name]) for name, entry in logged))
    return result


def task_scores(run: Mapping[str, Any], task: str) -> dict[str, dict[str, Any]]:
    """Return the scores of a task or group by metric. A metric of another filter than "none" has its name too.

    Args:
        run: lmms-eval's results.
        task: Name of the task or group.

    Raises:
        ValueError: If a score is not a finite number.

    Example:
        >>> task_scores({"results": {"gqa": {"alias": "gqa", "exact_match,none": 1, "exact_match_stderr,none": "N/A"}}}, "gqa")
        {'exact_match': {'value': 1.0, 'standard_error': None, 'higher_is_better': None}}
    """
    scores = {}
    for name, value in run["results"][task].items():
        metric, _, filter_name = name.rpartition(",")
        if (
            not metric
            or "_stderr" in metric
            or isinstance(value, bool)
            or not isinstance(value, (int, float, np.number))
        ):
            continue
        if not math.isfinite(value):
            raise ValueError(f"task {task}: its score {metric} is {value}, so it cannot be recorded")
        logged = run.get("samples", {}).get(task, ())
        scores[metric if filter_name == "none" else name] = {
            "value": float(value),
            "standard_error": standard_error(float(value), [entry.get(metric) for entry in logged]),
            "higher_is_better": run.get("higher_is_better", {}).get(task, {}).get(metric),
        }
    return scores


def standard_error(value: float, by_document: Sequence[Any]) -> float | None:
    """Return the standard error of a score that is the mean over documents, None for any other score.

    Args:
        value: The score.
        by_document: What the task logged of each document: a number, or a mapping with the number under "score".

    Example:
        >>> round(standard_error(0.5, [1.0, 0.0, 1.0, 0.0]), 4)
        0.2887
        >>> standard_error(0.9, [1.0, 0.0, 1.0, 0.0]) is None
        True
    """
    numbers = [each.get("score") if isinstance(each, dict) else each for each in by_document]
    if len(numbers) < 2 or not all(isinstance(number, (int, float, np.number)) for number in numbers):
        return None
    array = np.asarray(numbers, dtype=float)
    if not math.isclose(float(array.mean()), value, rel_tol=1e-6, abs_tol=1e-9):
        return None
    return float(array.std(ddof=1) / math.sqrt(len(array)))


def _task_version(settings: Mapping[str, Any]) -> str:
    """Return the version that a task file names, "none" if it names none."""
    metadata = settings.get("metadata") or {}
    entries = metadata if isinstance(metadata, list) else [metadata]
    return str(next((entry["version"] for entry in entries if isinstance(entry, dict) and "version" in entry), "none"))


def _first_cost(built: Any, config: Config) -> dict[str, Any]:
    """Return the cost of the first request's prompt with a one-word answer."""
    sample = built.sample(built.requests[0], _COST_ANSWER)
    limit = LengthLimit.for_model(built.model.config, config.data.max_length)
    question = EncodedQuestions([sample], built.processor, 1, built.device, limit=limit)
    cost = forward_cost(built.model, question, token_dropper_for_inference(config))
    return {name: cost[name] for name in BenchmarkCost.model_fields}


def _relevant_settings(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the answers to one task depend on, as plain containers."""
    settings = {name: value for name, value in resolved.items() if name not in IGNORED_SETTINGS}
    return {**settings, "data": {name: value for name, value in resolved["data"].items() if name != "tasks"}}


def _judge(tasks: Sequence[str]) -> dict[str, Any] | None:
    """Return the judge's address without its key, and its model; None if no task has a judge."""
    if not set(tasks) & JUDGED_TASKS.keys():
        return None
    parts = urlsplit(os.environ.get("OPENAI_API_URL") or DEFAULT_ADDRESS)
    host = parts.netloc.rpartition("@")[2]
    return {"address": f"{parts.scheme}://{host}{parts.path}", "model": os.environ.get("MODEL_VERSION")}
