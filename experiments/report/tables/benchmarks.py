"""Table over benchmarks: models and compressors in rows, the benchmarks of the paper's Tables 1 to 5 in columns."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments.records.views import Record
from experiments.report.benchmark_columns import (
    PUBLISHED_SCORES,
    BenchmarkColumn,
    benchmark_columns,
    column_score,
)
from experiments.report.benchmark_rows import BenchmarkRow, benchmark_rows, uncut_row
from experiments.report.formatting import NONE
from experiments.report.tables.table import Table

_DIFFERS = "\u2020"
_RELATIVE = "Relative (%)"
Columns = dict[tuple[str, BenchmarkColumn], str]


def benchmarks_table(records: Iterable[Record]) -> Table | None:
    """Build the table over benchmarks: one row for each model and compressor, then what the paper prints.

    Args:
        records: Finished records.

    Returns:
        The table; None if no record has benchmarks.
    """
    rows = benchmark_rows(records)
    if not rows:
        return None
    columns = _name_columns(rows)
    data, text = [], []
    uncut = [uncut_row(row, rows) for row in rows]
    for row, base in zip(rows, uncut, strict=True):
        scores = _scores(row, columns)
        relative, compared, possible = relative_score(row, base, columns) if base else (None, 0, 0)
        tokens = row.records[0]["cost"]["visual_tokens_mean"]
        data.append(
            {
                "model": row.label,
                "visual_tokens": tokens,
                "seeds": len(row.seeds),
                **_data_columns(scores, row, columns),
                "relative": relative,
                "relative_to": base.label if base else None,
                "weights": " ".join(sorted(row.weights)),
            }
        )
        partly = f" ({compared} of {possible})" if compared < possible else ""
        text.append(
            {
                "Model": row.label,
                "Tokens": f"{tokens:.4g}",
                "Seeds": str(len(row.seeds)),
                **{title: _format(scores.get(key), key[1], len(row.seeds)) for key, title in columns.items()},
                _RELATIVE: NONE if relative is None else f"{100 * relative:.1f}{partly}",
            }
        )
    comparable = {key[1].title: title for key, title in columns.items() if _may_show_published(key, rows)}
    for model, printed in PUBLISHED_SCORES.items():
        shown = {title: printed[name] for name, title in comparable.items() if name in printed}
        if shown:
            text.append(_published_row(f"{model}, as published", shown, columns))
            data.append({"model": f"{model}, as published", **shown})
    text_frame = pd.DataFrame(text)
    if all(base is None for base in uncut):
        text_frame = text_frame.drop(columns=_RELATIVE)
    return Table(
        "benchmarks",
        "Scores of public benchmarks by lmms-eval.",
        pd.DataFrame(data),
        text_frame,
        tuple(column for column in text_frame.columns if column != "Model"),
        tuple(_notes(rows, uncut, columns, bool(comparable))),
    )


def relative_score(
    row: BenchmarkRow, uncut: BenchmarkRow, columns: Iterable[tuple[str, BenchmarkColumn]]
) -> tuple[float | None, int, int]:
    """Return the mean over benchmarks of a row's score as a share of the uncut model's.

    The main score of each benchmark counts, over the seeds that both rows have of it. Left out are scores that are better
    when lower, those of which the uncut model's is 0, and those of other documents or seeds than the uncut model's.

    Args:
        row: The row.
        uncut: The row of the uncut model.
        columns: Task and column of each score.

    Returns:
        The mean, None if no benchmark can be compared; on how many benchmarks it is; and how many the uncut model has.
    """
    main = {key: "" for key in columns if key[1] is benchmark_columns(key[0])[0] or key[1].metric is None}
    others = _scores(uncut, main)
    usable = [key for key, score in others.items() if score["value"] != 0 and score["higher_is_better"] is not False]
    ratios = []
    for key in usable:
        shared = uncut.tasks[key[0]].keys() & row.tasks.get(key[0], {}).keys()
        own, other = (_scores(one, [key], shared).get(key) for one in (row, uncut))
        if own and other and other["value"] and _documents(row, key[0]) == _documents(uncut, key[0]):
            ratios.append(own["value"] / other["value"])
    return (float(np.mean(ratios)) if ratios else None), len(ratios), len(usable)


def _documents(row: BenchmarkRow, task: str) -> set[str]:
    return {part["documents_hash"] for part in row.tasks.get(task, {}).values()}


def _name_columns(rows: Sequence[BenchmarkRow]) -> Columns:
    """Return the columns that any row has a score for, with headings that name the task where two would be the same."""
    tasks = dict.fromkeys(task for row in rows for task in row.tasks)
    keys = [
        (task, column)
        for task in tasks
        for column in benchmark_columns(task)
        if any(column_score(part, task, column) for row in rows for part in row.tasks.get(task, {}).values())
    ]
    titles = [column.title for _, column in keys]
    return {
        (task, column): f"{column.title} ({task})" if titles.count(column.title) > 1 else column.title
        for task, column in keys
    }


def _scores(
    row: BenchmarkRow, columns: Iterable[tuple[str, BenchmarkColumn]], seeds: Collection[Any] | None = None
) -> dict[tuple[str, BenchmarkColumn], dict[str, Any]]:
    """Return the scores of a row: the mean over its seeds, and the root mean square of their standard errors.

    All seeds answer the same documents, so more seeds do not make the error over documents smaller.

    Args:
        row: The row.
        columns: Task and column of each score.
        seeds: The seeds to use; None for all.
    """
    scores = {}
    tasks = row.tasks
    for task, column in columns:
        parts = [part for seed, part in tasks.get(task, {}).items() if seeds is None or seed in seeds]
        of_seeds = [score for part in parts if (score := column_score(part, task, column))]
        if of_seeds:
            errors = [score["standard_error"] for score in of_seeds]
            known = [error for error in errors if error is not None]
            scores[task, column] = {
                **of_seeds[0],
                "seeds": len(of_seeds),
                "value": float(np.mean([score["value"] for score in of_seeds])),
                "standard_error": math.sqrt(np.mean(np.square(known))) if known and len(known) == len(errors) else None,
            }
    return scores


def _data_columns(
    scores: Mapping[tuple[str, BenchmarkColumn], Mapping[str, Any]], row: BenchmarkRow, columns: Columns
) -> dict[str, Any]:
    """Return the plain numbers of a row: score, standard error and documents of each column."""
    data: dict[str, Any] = {}
    for key, title in columns.items():
        score, parts = scores.get(key), row.tasks.get(key[0])
        data[title] = score and score["value"]
        data[f"{title} standard error"] = score and score["standard_error"]
        data[f"{title} documents"] = parts and next(iter(parts.values()))["documents"]
    return data


def _format(score: Mapping[str, Any] | None, column: BenchmarkColumn, seeds: int) -> str:
    if score is None:
        return NONE
    error = score["standard_error"]
    value = f"{score['value']:.{column.digits}f}"
    value = value if error is None else f"{value} \u00b1 {error:.{column.digits}f}"
    return value if score["seeds"] == seeds else f"{value} ({score['seeds']} of {seeds} seeds)"


def _may_show_published(key: tuple[str, BenchmarkColumn], rows: Sequence[BenchmarkRow]) -> bool:
    """Return whether a column may hold the paper's scores: its task may, and every row answered all documents."""
    answered = [row for row in rows if key[0] in row.tasks]
    return key[1].published and all(not row.records[0]["config"]["data"]["test_samples"] for row in answered)


def _published_row(label: str, shown: Mapping[str, float], columns: Columns) -> dict[str, str]:
    cells = {"Model": label, "Tokens": NONE, "Seeds": NONE}
    for (_, column), title in columns.items():
        mark = _DIFFERS if column.difference else ""
        cells[title] = f"{shown[title]:.{column.digits}f}{mark}" if title in shown else NONE
    return {**cells, _RELATIVE: NONE}


def _notes(
    rows: Sequence[BenchmarkRow], uncut: Sequence[BenchmarkRow | None], columns: Columns, published: bool
) -> Iterator[str]:
    entries = []
    for (task, column), title in columns.items():
        parts = [part for row in rows for part in row.tasks.get(task, {}).values()]
        score = next(filter(None, (column_score(part, task, column) for part in parts)))
        documents = " or ".join(str(n) for n in sorted({part["documents"] for part in parts}))
        entries.append(f"{title}: {task}, {score['metric']}, {documents} documents")
    yield f"{'; '.join(entries)}."
    yield (
        "After \u00b1: the standard error over documents, where a score is their mean. Of several seeds: the mean of the scores, "
        "and the root mean square of the standard errors. Tokens: visual tokens of the first prompt, mean over layers."
    )
    families = {base.label: base for base in uncut if base}
    if families:
        yield (
            "Relative: mean over benchmarks of the score as a share of the uncut model's on the same seeds, which is the row "
            f"{' or '.join(repr(label) for label in families)}. Scores that are better when lower are left out, and "
            "benchmarks on which the uncut model scores 0."
        )
    if published:
        differing = [f"{title}: {key[1].difference}" for key, title in columns.items() if key[1].difference]
        marked = f" {_DIFFERS} {'; '.join(differing)}." if differing else ""
        yield (
            "As published: the LLaVA-Mini paper (arXiv 2501.03895, Tables 1, 3 and 4), where split, prompt and metric are those "
            f"of the task.{marked}"
        )
    versions = sorted({record["benchmarks"]["lmms_eval"] for row in rows for record in row.records})
    judges = {judge for row in rows for record in row.records if (judge := _judge(record))}
    yield f"lmms-eval {', '.join(versions)}.{''.join(f' Judge: {judge}.' for judge in sorted(judges))}"
    for row in rows:
        if row.left_out:
            yield f"{row.label}: left out {', '.join(row.left_out)}, whose weights have changed since."


def _judge(record: Record) -> str | None:
    judge = record["benchmarks"].get("judge")
    return judge and f"{judge['model'] or 'the default model of each task'} at {judge['address']}"
