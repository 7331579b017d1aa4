"""Tasks of lmms-eval on a model in this process, where its silent failures become errors."""

from __future__ import annotations

import functools
import os
import re
from argparse import Namespace
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from experiments.lmms_eval_model.judge import check_judge, check_judgements
from experiments.lmms_eval_model.weights import weights_hash

TASKS_FOLDER = Path(__file__).parent / "tasks"
"""The tasks that lmms-eval lacks: `--include_path` on its command line."""

_VIDEO_TASKS = re.compile("activitynetqa|videochatgpt|mvbench|mlvu|egoschema|msvd_qa|msrvtt_qa")
# MME asserts that it has both questions of an image, MLVU counts a question type without questions as 0, and MMBench's
# later rows are the rotations of its earlier ones.
_WHOLE_TASKS = re.compile(r"mme|mlvu_\w+|mmbench\w*")


def evaluate_tasks(
    model: Any, tasks: Sequence[str], output: Path, limit: int | None = None, include: Sequence[Path] = ()
) -> dict[str, Any]:
    """Run tasks of lmms-eval, and return its results.

    lmms-eval's response cache is never used: it is keyed by the model's path, so new weights in the same folder would get
    the answers of the old ones.

    Args:
        model: A `BuiltModel` or `PretrainedModel`.
        tasks: Names of tasks and groups: lmms-eval's, those of `TASKS_FOLDER`, and those of `include`.
        output: Folder for the files that some tasks write to be submitted.
        limit: How many documents of each task to run; None for all.
        include: Further folders with task files. A task there cannot replace one of lmms-eval.

    Returns:
        lmms-eval's results: `results` by task and metric, `samples` with one entry a document, and `configs`. `config`
        also names `weights`, a hash of the model's weights, and `lmms_eval`, its version. In a run of several processes,
        all but the first get an empty dictionary.

    Raises:
        FileNotFoundError: If a video is missing.
        ValueError: If a task is unknown, needs a judge or HF_HOME that is not there, or cannot be limited; or if a task
            has no results.
    """
    check_tasks(tasks, limit, include)
    results = run_tasks(model, tasks, output, limit, include)
    if results:
        results["config"] |= {"weights": weights_hash(model.model), "lmms_eval": version("lmms-eval")}
    return results


def check_tasks(tasks: Sequence[str], limit: int | None = None, include: Sequence[Path] = ()) -> None:
    """Check, before any model is loaded, that tasks can run.

    Args:
        tasks: As for `evaluate_tasks`, like the other arguments.

    Raises:
        ValueError: If a task is unknown, needs a judge or HF_HOME that is not there, or cannot be limited.
    """
    check_judge(tasks, os.environ)
    for task in tasks:
        if _VIDEO_TASKS.match(task) and not os.environ.get("HF_HOME"):
            raise ValueError(f"HF_HOME: not set, and {task} reads its videos there; set it to the folder of the videos")
        if limit is not None and _WHOLE_TASKS.fullmatch(task):
            raise ValueError(f"limit: {task} has a score for all of its documents alone; leave out limit={limit}")
    if unknown := sorted(set(tasks) - set(_task_manager(include).all_tasks)):
        raise ValueError(f"tasks: lmms-eval {version('lmms-eval')} has no '{unknown[0]}'; `lmms-eval tasks` lists all")


def run_tasks(
    model: Any, tasks: Sequence[str], output: Path, limit: int | None = None, include: Sequence[Path] = ()
) -> dict[str, Any]:
    """Run tasks that `check_tasks` has accepted, and return lmms-eval's results without the hash of the weights.

    Afterwards `model.requests` holds the requests that were answered.

    Args:
        model: As for `evaluate_tasks`, like the other arguments.

    Raises:
        FileNotFoundError: If a video is missing.
        ValueError: If a task has no score, or an answer no judgement.
    """
    from lmms_eval.evaluator import simple_evaluate
    from tenacity import RetryError

    model.requests = []
    try:
        results = simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=_task_manager(include),
            batch_size=model.batch_size,
            limit=limit,
            bootstrap_iters=0,
            cli_args=Namespace(output_path=str(output), process_with_media=False),
        )
    except RetryError as error:  # the reason is the last attempt's; a task repeats its scoring five times
        raise error.last_attempt.exception() or error from error
    if results is None:
        return {}
    if missing := [name for name in tasks if not results["results"].get(name)]:
        raise ValueError(f"tasks: lmms-eval returned no results of {missing[0]}")
    check_judgements(results["samples"])
    return results


def _task_manager(include: Sequence[Path]) -> Any:
    return _cached_task_manager((str(TASKS_FOLDER), *map(str, include)))


@functools.cache
def _cached_task_manager(folders: tuple[str, ...]) -> Any:
    """Return lmms-eval's index of its tasks and those in `folders`. Reading its 2,000 files takes seconds."""
    from lmms_eval.tasks import TaskManager

    from experiments.lmms_eval_model.manifest import MODEL_NAME

    return TaskManager("WARNING", include_path=list(folders), model_name=MODEL_NAME)
