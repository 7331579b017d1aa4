"""Scores of generated answers: columns of tables that compare accuracies, and a table with their blind controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from experiments.records.generated import score_name
from experiments.report.experiment_results import ExperimentResults
from experiments.report.formatting import NONE, format_interval, format_p_value
from experiments.report.generated_scores import generated_of, score_interval, score_note, score_tenths
from experiments.report.published_scores import comparable_benchmark, published_score
from experiments.report.question_pairing import may_be_paired
from experiments.report.run_groups import RunGroup
from experiments.report.statistics import holm, paired_test
from experiments.report.tables.experiment_rows import BENCHMARKS
from experiments.report.tables.table import Table, data_frame, group_name, interval_columns, with_columns

_CONTROLS = {"blank": "grey image", "shuffled": "another question\u2019s image"}
_DATA_COLUMNS = (
    *("model", "metric", "references", "control", "examples", "seeds", "image", "image_low", "image_high", "without"),
    *("without_low", "without_high", "difference", "difference_low", "difference_high", "p_holm"),
)


def with_score_columns(table: Table, groups: Sequence[RunGroup | None], baselines: Sequence[RunGroup | None]) -> Table:
    """Return a table with columns for the scores of generated answers, unchanged if no group has any.

    Args:
        table: A table of run groups.
        groups: The group of each row; None for a row without runs.
        baselines: The group that each row is compared with; None for none.
    """
    part = next((generated_of(group) for group in groups if group and generated_of(group)), None)
    if part is None:
        return table
    name = score_name(part)
    scores = [_scores_of(group, name) for group in groups]
    references = [_scores_of(baseline, name) for baseline in baselines]
    comparable = [
        score is not None and reference is not None and group and baseline and may_be_paired(group, baseline)
        for score, reference, group, baseline in zip(scores, references, groups, baselines, strict=True)
    ]
    pairs = [pair for pair, compared in zip(zip(scores, references, strict=True), comparable, strict=True) if compared]
    p_values = iter(holm([paired_test(*pair) for pair in pairs]))
    data, text = [], []
    for score, reference, compared in zip(scores, references, comparable, strict=True):
        interval = None if score is None else score_interval(score)
        difference = score_interval(score, reference) if compared else None
        p_value = next(p_values) if compared else None
        data.append(
            {
                **interval_columns("generated_score", interval),
                **interval_columns("generated_difference", difference),
                "generated_p_holm": p_value,
            }
        )
        text.append(
            {
                f"{name} (%)": format_interval(interval) if interval else NONE,
                "Difference (generated)": format_interval(difference, sign=True) if difference else NONE,
                "p (generated)": format_p_value(p_value) if p_value is not None else NONE,
            }
        )
    return with_columns(table, data, text, score_note(part))


def with_published_column(table: Table, results: ExperimentResults) -> Table:
    """Return an experiment's table with the paper's scores, where its scores are of the same benchmark and metric.

    Args:
        table: The table, with one row for each of the experiment's rows.
        results: The experiment's rows with their runs.
    """
    benchmark = comparable_benchmark(results)
    if benchmark is None:
        return table
    scores = [published_score(row.settings, benchmark) for row in results.rows]
    heading = f"Paper, {BENCHMARKS[benchmark]}"
    return with_columns(
        table,
        [{f"paper_{benchmark}": score} for score in scores],
        [{heading: NONE if score is None else f"{score:.1f}"} for score in scores],
        f"{heading}: the score that the paper prints, of the same metric. Its questions and prompts are the benchmark's own; "
        "those here are the file's.",
    )


def generated_scores_table(groups: Sequence[RunGroup]) -> Table | None:
    """Build the table of the scores of generated answers, with the image and under each blind control.

    Args:
        groups: All run groups of the report.

    Returns:
        The table, or None if no group has generated answers.
    """
    data, text = [], []
    notes: dict[str, None] = {}
    for group in groups:
        part, image = generated_of(group), score_tenths(group)
        if part is None or image is None:
            continue
        notes[score_note(part)] = None
        row: dict[str, Any] = {"model": group_name(group), "metric": part["metric"], "references": part["references"]}
        row |= {"examples": image.shape[1], "seeds": len(image), **interval_columns("image", score_interval(image))}
        cells = {
            "Model": group_name(group),
            "Metric": score_name(part),
            "n": str(image.shape[1]),
            "Seeds": str(len(image)),
            "Image (%)": format_interval(score_interval(image)),
        }
        controls = {name: tenths for name in _CONTROLS if (tenths := score_tenths(group, name)) is not None}
        p_values = holm([paired_test(image, control) for control in controls.values()])
        for (name, control), p_value in zip(controls.items(), p_values, strict=True):
            without, difference = score_interval(control), score_interval(image, control)
            data.append(
                {
                    **row,
                    "control": name,
                    **interval_columns("without", without),
                    **interval_columns("difference", difference),
                    "p_holm": p_value,
                }
            )
            text.append(
                {
                    **cells,
                    "Control": _CONTROLS[name],
                    "Control (%)": format_interval(without),
                    "Difference": format_interval(difference, sign=True),
                    "p": format_p_value(p_value),
                }
            )
        if not controls:
            data.append(row)
            text.append(cells | dict.fromkeys(("Control", "Control (%)", "Difference", "p"), NONE))
    if not text:
        return None
    numeric = tuple(column for column in text[0] if column not in ("Model", "Metric", "Control"))
    caption = "Scores of generated answers, and of blind controls on the same questions."
    frame = data_frame(data, _DATA_COLUMNS).reindex(columns=list(_DATA_COLUMNS))
    return Table("generated_scores", caption, frame, pd.DataFrame(text), numeric, tuple(notes))


def _scores_of(group: RunGroup | None, name: str) -> Any:
    """Return a group's scores in tenths; None if it has none of this metric."""
    part = generated_of(group) if group is not None else None
    return score_tenths(group) if group is not None and part is not None and score_name(part) == name else None
