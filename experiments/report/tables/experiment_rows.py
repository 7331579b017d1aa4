"""Experiment table: the rows of one experiment with accuracy, differences and cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from experiments.records.views import Record, failure_reason, mean_visual_tokens, record_seed
from experiments.report.experiment_results import (
    DIFFERENCE_RULE,
    OTHER_DATA,
    OTHER_FILES,
    ExperimentResults,
    ResultRow,
    blind_accuracies,
)
from experiments.report.file_versions import file_versions
from experiments.report.formatting import (
    ACCURACY_DEFINITION,
    EXACT_MATCH,
    NONE,
    format_interval,
    format_milliseconds,
    format_p_value,
    format_quantity,
)
from experiments.report.question_pairing import PAIRING_NOTE
from experiments.report.run_groups import RunGroup
from experiments.report.tables.table import LATENCY_COLUMN, Table, interval_columns
from experiments.report.training_ends import (
    STILL_IMPROVING,
    TRAINING_COLUMN,
    training_end,
    training_notes,
    trains_until_plateau,
)

BENCHMARKS = {"vqav2": "VQAv2", "gqa": "GQA", "mmb": "MMB"}
"""Benchmarks that the paper's ablations print, by the names that an experiment's rows use."""
_MEASURED_COLUMNS = ("Tokens", "FLOPs", LATENCY_COLUMN, "Accuracy (%)", "Difference", "p", "n")


def experiment_table(results: ExperimentResults) -> Table:
    """Build the table of an experiment's rows: accuracy, difference from the first row, and cost.

    The paper's scores are not beside them: they are the benchmarks' own metrics on generated answers, and accuracy here is
    the exact match of teacher-forced tokens.

    Args:
        results: The experiment's rows with their runs.
    """
    baseline = results.rows[0]
    p_values = [None, *results.holm_p_values([(row, baseline) for row in results.rows[1:]])]
    varied = _varied_keys(results)
    timed = any(row.runs.latency > 0 for row in results.finished_rows if row.runs)
    until_plateau = any(map(trains_until_plateau, finished_records(results)))
    data, text = [], []
    for row, p_value in zip(results.rows, p_values, strict=True):
        difference = results.difference(row, baseline) if p_value is not None else None
        data.append(
            {
                "row": row.label,
                **{key: _csv_value(row.settings.values[key]) for key in results.spec.setting_keys},
                "visual_tokens": mean_visual_tokens(row.runs.finished) if row.finished and row.runs else None,
                **interval_columns("accuracy", row.runs.accuracy if row.runs else None),
                "best": row is results.best_row,
                "examples": row.runs.examples if row.finished and row.runs else None,
                "seeds": len(row.runs.finished) if row.runs else 0,
                "seeds_wanted": len(results.seeds),
                **interval_columns("difference", difference),
                "p_holm": p_value,
                "flops": row.runs.flops if row.runs else None,
                **({"latency_seconds": row.runs.latency if row.runs else None} if timed else {}),
                **({"still_improving": row.still_improving} if until_plateau else {}),
                "status": row.status,
            }
        )
        cells = {"Row": row.label} | {column_heading(key): _cell_text(row.settings.values[key]) for key in varied}
        if row.runs is None or row.runs.accuracy is None:
            columns = [column for column in _MEASURED_COLUMNS if timed or column != LATENCY_COLUMN]
            columns += [TRAINING_COLUMN] if until_plateau else []
            text.append({**cells, **dict.fromkeys(columns, row.status), "Seeds": f"0 of {len(results.seeds)}"})
        else:
            reason = "baseline" if row is baseline else "other questions" if baseline.finished else "no baseline"
            text.append(
                {
                    **cells,
                    "Tokens": f"{mean_visual_tokens(row.runs.finished):.3g}",
                    "FLOPs": format_quantity(row.runs.flops),
                    **({LATENCY_COLUMN: format_milliseconds(row.runs.latency)} if timed else {}),
                    "Accuracy (%)": format_interval(row.runs.accuracy),
                    "Difference": format_interval(difference, sign=True) if difference else reason,
                    "p": format_p_value(p_value) if p_value is not None else reason,
                    "n": str(row.runs.examples),
                    **({TRAINING_COLUMN: training_end(row.runs)} if until_plateau else {}),
                    "Seeds": _seed_count(row, results),
                }
            )
    best = results.best_row
    bold = frozenset({(best.number, "Accuracy (%)")} if best else ())
    text_columns = {
        column_heading(key) for key in varied if not all(_is_number(r.settings.values[key]) for r in results.rows)
    }
    numeric = tuple(column for column in text[0] if column not in {"Row", TRAINING_COLUMN, *text_columns})
    notes = tuple(_notes(results))
    return Table(results.name, _caption(results), pd.DataFrame(data), pd.DataFrame(text), numeric, notes, bold)


def column_heading(key: str) -> str:
    """Turn a dotted configuration key into a column heading: prefusion.layers becomes "Pre-fusion layers"."""
    words = key.removesuffix(".name").replace("prefusion", "pre-fusion").replace(".", " ").replace("_", " ")
    return words[0].upper() + words[1:]


def describe_measurement(results: ExperimentResults) -> str:
    """Describe data, number of questions, seeds, model and device of an experiment's finished runs."""
    records = finished_records(results)
    if not records:
        return "nothing finished"
    tasks = sorted({f"{record['data']['name']}, {record['data'].get('split', 'test')} split" for record in records})
    examples = sorted({record["data"]["examples"] for record in records})
    devices = sorted({record["provenance"].get("device") or "device unknown" for record in records})
    model, seeds = results.config.get("model.name", "model unknown"), len(results.seeds)
    return (
        f"{'; '.join(tasks)}, n = {' and '.join(map(str, examples))} questions, {seeds} seed{'s' * (seeds > 1)}, model "
        f"{model}, {', '.join(devices)}"
    )


def finished_records(results: ExperimentResults) -> list[Record]:
    """Return the records of all finished runs of an experiment, in the order of its rows."""
    return [record for row in results.finished_rows if row.runs for record in row.runs.finished]


def _caption(results: ExperimentResults) -> str:
    parts = [results.spec.title]
    parts.append(
        f"Accuracy ({EXACT_MATCH}, %): {describe_measurement(results)}."
        if results.finished_rows
        else "No row is finished."
    )
    if scaling := results.spec.scaling_note(results.config):
        parts.append(scaling)
    if merged := [row.label for row in results.rows if len(row.settings.paper) > 1]:
        parts.append(f"Rows with the same settings on this model are merged: {'; '.join(merged)}.")
    return " ".join(parts)


def _notes(results: ExperimentResults) -> list[str]:
    records = finished_records(results)
    blind = "; ".join(f"{name} {100 * value:.1f}" for name, value in blind_accuracies(results).items())
    conventions = sorted({r["cost"].get("convention") or "unstated" for r in records if r.get("cost")})
    code_versions = {record["provenance"].get("code") for record in records}
    fingerprints = {record["data"]["fingerprint"] for record in records}
    latency_notes = sorted({r["cost"]["latency_note"] for r in records if "latency_note" in (r.get("cost") or {})})
    excluded = results.excluded_families
    notes = [
        f"{ACCURACY_DEFINITION} Mean over n questions and the seeds, with its 95% bootstrap interval over both. With two or "
        "three seeds the interval is too narrow where these differ much."
        + (f" Blind controls: {blind}." if blind else ""),
        f"Bold: the highest accuracy, if the row differs from every other row by {DIFFERENCE_RULE}.{_why_no_bold(results)}",
        "Difference: percentage points from the first row, with its 95% interval (same questions; the seeds of each row "
        "are resampled separately). p: exact paired test over examples, Holm-corrected for the rows compared. The test is "
        "about these trained models, not about other seeds.",
        "Tokens: visual tokens that the language model reads; the mean over its layers if some tokens are removed on the "
        "way.",
        *(f"FLOPs of one prompt: {convention}." for convention in conventions),
        *(f"Latency: {note}." for note in latency_notes),
        *training_notes(records, "it is neither bold nor ordered"),
        *(note for row in results.rows if row.runs for note in _missing_run_notes(row, row.runs)),
    ]
    if not_run := [row.label for row in results.rows if row.runs is None]:
        notes.append(f"Not run: {'; '.join(not_run)}.")
    if len(fingerprints) > 1:
        notes.append(PAIRING_NOTE)
    if len(code_versions) > 1:
        notes.append(f"The records come from {len(code_versions)} versions of the code.")
    for (setting, value), versions in file_versions(records).items():
        notes.append(
            f"The rows come from {len(versions)} versions of the model's files: those of {setting}={value} have the hashes "
            f"{' and '.join(versions)}."
        )
    if excluded:
        by_setting = any(family not in (OTHER_DATA, OTHER_FILES) for family in excluded)
        notes.append(
            f"{len(excluded)} other famil{'y' if len(excluded) == 1 else 'ies'} of records of this experiment left "
            f"out, set apart by {'; '.join(excluded)}."
            + (f" To select one, add its setting after experiment={results.name}." if by_setting else "")
        )
    return notes


def _why_no_bold(results: ExperimentResults) -> str:
    if results.best_row is not None or len(results.finished_rows) < 2:
        return ""
    if improving := [row.label for row in results.finished_rows if row.still_improving]:
        return f" No row is bold here, because rows were {STILL_IMPROVING}: {'; '.join(improving)}."
    first, second = results.ranked_rows[:2]
    if not results.comparable(first, second):
        return " No row is bold here."
    difference = format_interval(results.difference(first, second), sign=True)
    p_value = format_p_value(results.p_value(first, second))
    return (
        f" No row is bold here: the highest, {first.label}, differs by {difference} from the next, {second.label} "
        f"(p = {p_value})."
    )


def _missing_run_notes(row: ResultRow, runs: RunGroup) -> list[str]:
    seeds: dict[str, list[Any]] = {}
    for record in runs.failed:
        newer = "" if record in runs.lost else "a newer run "
        seeds.setdefault(newer + failure_reason(record), []).append(record_seed(record))
    if row.missing_seeds:
        seeds["not run"] = list(row.missing_seeds)
    return [
        f"{row.label}, seed{'s' * (len(numbers) > 1)} {_comma_list(numbers)}: {reason}."
        for reason, numbers in seeds.items()
    ]


def _comma_list(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def _seed_count(row: ResultRow, results: ExperimentResults) -> str:
    finished, total = len(row.runs.finished) if row.runs else 0, len(results.seeds)
    return str(finished) if finished == total else f"{finished} of {total}"


def _varied_keys(results: ExperimentResults) -> list[str]:
    """Return the keys that get a column in the text: single values that differ between rows.

    If a group's name differs, only the name gets a column. The size has none, because the token count shows it. The CSV
    has all keys.
    """
    values = [row.settings.values for row in results.rows]
    differing = [key for key in results.spec.setting_keys if any(v[key] != values[0][key] for v in values)]
    named_groups = {key.removesuffix("name") for key in differing if key.endswith(".name")}
    return [
        key
        for key in differing
        if key != "compressor.size"
        and (key.endswith(".name") or not key.startswith(tuple(named_groups)))
        and not any(isinstance(v[key], (list, Mapping)) for v in values)
    ]


def _cell_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return NONE if value is None else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _csv_value(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value
