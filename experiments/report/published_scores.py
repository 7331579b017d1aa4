"""Which published scores may stand beside the scores of records."""

from __future__ import annotations

from experiments.report.experiment_results import ExperimentResults
from experiments.report.experiment_specs import RowSettings

# A published score is a value of its benchmark's own metric, and compares with no other metric. VQAv2's is VQA accuracy of
# generated answers with ten annotators, GQA's the exact match of generated answers. MMBench's asks each question with every
# rotation of its options, which a file of single questions does not, so no score of such a file compares with it.
_OWN_METRICS = {"vqav2": ("vqa", 10), "gqa": ("gqa", 1)}
"""Metric and number of references, as records name them, by the benchmark's `data.name`."""


def comparable_benchmark(results: ExperimentResults) -> str | None:
    """Return the benchmark whose published scores may stand beside an experiment's scores of generated answers.

    Args:
        results: The experiment's rows with their runs.

    Returns:
        Its name in `paper` of the rows. None unless `data.name` is a benchmark that the paper prints, and every finished
        record has its own metric.
    """
    name = str(results.config.get("data.name", "")).lower()
    parts = [record.get("generated") for row in results.finished_rows if row.runs for record in row.runs.finished]
    has_own_metric = all(part and (part["metric"], part["references"]) == _OWN_METRICS.get(name) for part in parts)
    is_printed = any(name in paper for row in results.rows for paper in row.settings.paper)
    return name if parts and has_own_metric and is_printed else None


def published_score(row: RowSettings, benchmark: str) -> float | None:
    """Return the score that the paper prints in a row, in percent.

    Args:
        row: The row; it holds several printed rows if these were merged.
        benchmark: Name of the benchmark in `paper`.

    Returns:
        The score; None if the paper prints none, or several.
    """
    scores = {paper.get(benchmark) for paper in row.paper}
    return scores.pop() if len(scores) == 1 else None
