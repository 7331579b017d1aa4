"""The columns of the table over benchmarks: which score of a task each one shows, and what the paper prints there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BenchmarkColumn:
    """One column: a metric of a task.

    Attributes:
        title: Heading, as in the paper's Tables 1 to 5; a task that is not in the paper has its own name.
        metric: lmms-eval's metric; None for the first of the task.
        scale: Factor from lmms-eval's unit to the paper's.
        digits: Digits after the point.
        published: Whether the paper's scores may stand in this column (docs/benchmarks.md, Comparing with the paper).
        difference: What still differs from the paper's score, "" for nothing.
    """

    title: str
    metric: str | None
    scale: float = 1.0
    digits: int = 1
    published: bool = False
    difference: str = ""


_VQA = ("exact_match", 100.0)
_SCORER = "another scorer than the paper's"
_COLUMNS: dict[str, tuple[BenchmarkColumn, ...]] = {
    "vqav2_val": (BenchmarkColumn("VQAv2", *_VQA),),
    "gqa": (BenchmarkColumn("GQA", *_VQA, published=True),),
    "vizwiz_vqa_val": (BenchmarkColumn("VizWiz", *_VQA),),
    "scienceqa_img": (
        BenchmarkColumn("SQA-I", *_VQA, published=True, difference="the paper's script gives the image twice"),
    ),
    "textvqa_val": (BenchmarkColumn("TextVQA", *_VQA),),
    "textvqa_val_published": (BenchmarkColumn("TextVQA", *_VQA, published=True),),
    "pope": (
        BenchmarkColumn(
            "POPE",
            "pope_f1_score",
            100.0,
            published=True,
            difference="F1 over all questions here; LLaVA's scripts average it over three sets of questions",
        ),
    ),
    "pope_full": (BenchmarkColumn("POPE", "pope_f1_score", 100.0, published=True),),
    "mme": (BenchmarkColumn("MME", "mme_perception_score", published=True),),
    "mmbench_en_dev_static": (BenchmarkColumn("MMB", "gpt_eval_score"),),
    "mmbench_en_dev_published": (BenchmarkColumn("MMB", "gpt_eval_score", published=True),),
    "seedbench": (BenchmarkColumn("SEED", "seed_all", 100.0),),
    "seedbench_published": (BenchmarkColumn("SEED", "seed_all", 100.0, published=True),),
    "seedbench_ppl": (BenchmarkColumn("SEED", "acc", 100.0),),
    "llava_in_the_wild": (BenchmarkColumn("LLaVA-W", "gpt_eval_llava_all"),),
    "mmvet": (BenchmarkColumn("MM-Vet", "gpt_eval_score"),),
    **{
        task: (
            BenchmarkColumn(title, "gpt_eval_accuracy"),
            BenchmarkColumn(f"{title} score", "gpt_eval_score", digits=2),
        )
        for task, title in (("msvd_qa", "MSVD-QA"), ("msrvtt_qa", "MSRVTT-QA"), ("activitynetqa", "ActivityNet-QA"))
    },
    "videochatgpt": tuple(
        BenchmarkColumn(title, f"gpt_eval_score_{metric}", digits=2)
        for title, metric in (
            ("Correctness", "correctness"),
            ("Detail", "detailed_orientation"),
            ("Context", "context"),
            ("Temporal", "temporal"),
            ("Consistency", "consistency"),
        )
    ),
    "mvbench": (BenchmarkColumn("MVBench", "mvbench_accuracy"),),
    "mvbench_published": (BenchmarkColumn("MVBench", "mvbench_accuracy", published=True, difference=_SCORER),),
    "mlvu_dev": (BenchmarkColumn("MLVU", "mlvu_percetion_score"),),
    "mlvu_dev_published": (BenchmarkColumn("MLVU", "mlvu_percetion_score", published=True, difference=_SCORER),),
    "mlvu_test": (BenchmarkColumn("MLVU", "mlvu_percetion_score"),),
    "egoschema_subset": (BenchmarkColumn("EgoSchema", "score", 100.0),),
}

_PRINTED = ("GQA", "SQA-I", "TextVQA", "POPE", "MME", "MMB", "SEED", "MVBench", "MLVU")
PUBLISHED_SCORES: dict[str, dict[str, float]] = {
    model: dict(zip(_PRINTED, scores, strict=False))
    for model, scores in (
        ("LLaVA-v1.5 7B", (62.0, 66.8, 58.2, 85.9, 1510.7, 64.3, 58.6)),
        ("LLaVA-Mini 7B", (60.9, 70.4, 57.0, 84.4, 1466.0, 65.6, 58.5, 44.5, 42.8)),
        ("LLaVA-Mini-HD 7B", (61.8, 69.7, 59.1, 85.3, 1476.8, 67.5, 60.2)),
        ("LLaVA-Mini, Llama-3.1-8B", (61.3, 83.1, 58.5, 85.3, 1522.7, 71.6, 63.0)),
    )
}
"""What the LLaVA-Mini paper prints (arXiv 2501.03895, Tables 1, 3 and 4), by model and heading of a column that may hold
a published score. The other scores are of other splits, prompts or judges than lmms-eval's."""


def benchmark_columns(task: str) -> tuple[BenchmarkColumn, ...]:
    """Return the columns of a task. The first is its main score.

    Args:
        task: Name of the task or group, as in `data.tasks`.

    Example:
        >>> [column.title for column in benchmark_columns("msvd_qa")]
        ['MSVD-QA', 'MSVD-QA score']
    """
    return _COLUMNS.get(task, (BenchmarkColumn(task, None, digits=3),))


def column_score(part: Mapping[str, Any], task: str, column: BenchmarkColumn) -> dict[str, Any] | None:
    """Return the score that a column shows of one record's task, None if the record has none.

    A group without a score of its own has the mean over its tasks, as the paper takes it for MVBench.

    Args:
        part: The task's part of the record (`BenchmarkTask`).
        task: Its name.
        column: The column.

    Returns:
        `value` and `standard_error` in the column's unit, `higher_is_better`, and `metric`, lmms-eval's name.

    Example:
        >>> scores = {"a": {"acc": {"value": 0.5}}, "b": {"acc": {"value": 0.25}}}
        >>> column_score({"scores": scores}, "group", BenchmarkColumn("group", None))["value"]
        0.375
    """
    scores = part["scores"]
    sources = [scores[task]] if task in scores else list(scores.values())
    names = {column.metric or next(iter(source)) for source in sources}
    found = [source[name] for source in sources for name in names if name in source]
    if not found or (column.metric is None and len(names) > 1):
        return None
    errors = [score.get("standard_error") for score in found]
    return {
        "value": column.scale * sum(score["value"] for score in found) / len(found),
        "standard_error": column.scale * errors[0] if len(errors) == 1 and errors[0] is not None else None,
        "higher_is_better": found[0].get("higher_is_better"),
        "metric": next(iter(names)),
    }
