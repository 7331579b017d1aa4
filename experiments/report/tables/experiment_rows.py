"""Two tables of a study: its rows, and which of the paper's orderings hold in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from experiments.records.views import Record, failure, seed
from experiments.report.experiment_results import RULE, Row, Study, references
from experiments.report.formatting import NONE, milliseconds, p_text, percent, quantity
from experiments.report.run_groups import Cell
from experiments.report.tables.table import LATENCY, Table, bounds

BENCHMARKS = {"vqav2": "VQAv2", "gqa": "GQA", "mmb": "MMB"}
"""The paper's ablations print these three, by the names that an experiment's rows give them."""


def row_table(study: Study) -> Table:
    """The rows of a study with accuracy, its difference to the first row, cost, and the paper's value where the data
    are one of the paper's tasks."""
    baseline, task = study.rows[0], _task(study)
    p_values = [None, *study.p_corrected([(row, baseline) for row in study.rows[1:]])]
    varied = _varied(study)
    timed = any(row.cell.latency > 0 for row in study.finished if row.cell)
    data, text = [], []
    for row, p_value in zip(study.rows, p_values, strict=True):
        difference = study.difference(row, baseline) if p_value is not None else None
        data.append(
            {
                "row": row.label,
                **{key: _plain(row.setting.values[key]) for key in study.definition.keys},
                "visual_tokens": _tokens(row.cell) if row.finished and row.cell else None,
                **bounds("accuracy", row.cell.accuracy if row.cell else None),
                "best": row is study.best,
                "examples": row.cell.examples if row.finished and row.cell else None,
                "seeds": len(row.cell.finished) if row.cell else 0,
                "seeds_wanted": len(study.seeds),
                **bounds("difference", difference),
                "p_holm": p_value,
                "flops": row.cell.flops if row.cell else None,
                **({"latency_seconds": row.cell.latency if row.cell else None} if timed else {}),
                **({f"paper_{task}": _shared(row, task)} if task else {}),
                "status": row.state,
            }
        )
        shown = {"Row": row.label} | {heading(key): _value(row.setting.values[key]) for key in varied}
        if row.cell is None or row.cell.accuracy is None:
            columns = [column for column in _COLUMNS if timed or column != LATENCY]
            text.append({**shown, **dict.fromkeys(columns, row.state), "Seeds": f"0 of {len(study.seeds)}"})
        else:
            why = "baseline" if row is baseline else "other questions" if baseline.finished else "no baseline"
            text.append(
                {
                    **shown,
                    "Tokens": f"{_tokens(row.cell):.3g}",
                    "FLOPs": quantity(row.cell.flops),
                    **({LATENCY: milliseconds(row.cell.latency)} if timed else {}),
                    "Accuracy (%)": percent(row.cell.accuracy),
                    "Difference": percent(difference, sign=True) if difference else why,
                    "p": p_text(p_value) if p_value is not None else why,
                    "n": str(row.cell.examples),
                    "Seeds": _seeds(row, study),
                }
            )
        if task:
            value = _shared(row, task)
            text[-1][f"Paper, {BENCHMARKS.get(task, task)}"] = NONE if value is None else f"{value:.1f}"
    bold = frozenset({(study.best.number, "Accuracy (%)")} if study.best else ())
    words = {heading(key) for key in varied if not all(_is_number(row.setting.values[key]) for row in study.rows)}
    numeric = tuple(column for column in text[0] if column not in {"Row", *words})
    return Table(
        study.name, _caption(study), pd.DataFrame(data), pd.DataFrame(text), numeric, tuple(_notes(study)), bold
    )


_COLUMNS = ("Tokens", "FLOPs", LATENCY, "Accuracy (%)", "Difference", "p", "n")


def heading(key: str) -> str:
    """A dotted key of a configuration as the heading of a column: "Pre-fusion layers" for prefusion.layers."""
    words = key.removesuffix(".name").replace("prefusion", "pre-fusion").replace(".", " ").replace("_", " ")
    return words[0].upper() + words[1:]


def _caption(study: Study) -> str:
    parts = [study.definition.title]
    parts.append(f"Accuracy (%): {_where(study)}." if study.finished else "No row is finished.")
    if scaled := study.definition.scaled_sizes(study.config):
        parts.append(scaled)
    if one := [row.label for row in study.rows if len(row.setting.paper) > 1]:
        parts.append(f"Rows that are the same settings on this model are one: {'; '.join(one)}.")
    return " ".join(parts)


def _where(study: Study) -> str:
    records = [record for row in study.finished if row.cell for record in row.cell.finished]
    if not records:
        return "nothing finished"
    tasks = sorted({f"{record['data']['name']}, {record['data'].get('split', 'test')} split" for record in records})
    examples = sorted({record["data"]["examples"] for record in records})
    devices = sorted({record["provenance"].get("device") or "device unknown" for record in records})
    model, seeds = study.config.get("model.name", "model unknown"), len(study.seeds)
    return (
        f"{'; '.join(tasks)}, n = {' and '.join(map(str, examples))} questions, {seeds} seed{'s' * (seeds > 1)}, model "
        f"{model}, {', '.join(devices)}"
    )


def _notes(study: Study) -> list[str]:
    records = [record for row in study.finished if row.cell for record in row.cell.finished]
    blind = "; ".join(f"{name} {100 * value:.1f}" for name, value in references(study).items())
    conventions = sorted({r["cost"].get("convention") or "unstated" for r in records if r.get("cost")})
    versions = {record["provenance"].get("code") for record in records}
    prints = {record["data"]["fingerprint"] for record in records}
    left_out = study.left_out
    return [
        "Accuracy: mean over n questions and the seeds, with its 95% bootstrap interval over both; with few seeds it "
        "understates how much seeds differ." + (f" Without sight: {blind}." if blind else ""),
        f"Bold: the highest accuracy, if the row differs from each other row by {RULE}.{_no_bold(study)}",
        "Difference: percentage points from the first row, with its 95% interval (same questions, seeds drawn for "
        "each). p: exact paired test over examples, Holm-corrected for the rows compared; it speaks of these trained "
        "models, not of other seeds.",
        "Tokens: visual tokens that the language model reads, the mean over its layers where some leave on the way.",
        *(f"FLOPs of one prompt: {convention}." for convention in conventions),
        *(
            f"Latency: {note}."
            for note in sorted({r["cost"]["latency_note"] for r in records if "latency_note" in (r.get("cost") or {})})
        ),
        *(line for row in study.rows for line in _hole_notes(row)),
        *(["Rows were asked about other data, question by question in the same order."] if len(prints) > 1 else []),
        *([f"The records come from {len(versions)} versions of the code."] if len(versions) > 1 else []),
        *(
            [
                f"{len(left_out)} other famil{'y' if len(left_out) == 1 else 'ies'} of records of this experiment left "
                f"out, set apart by {'; '.join(left_out)}. A setting after experiment={study.name} chooses."
            ]
            if left_out
            else []
        ),
    ]


def _no_bold(study: Study) -> str:
    if study.best is not None or len(study.finished) < 2:
        return ""
    first, second = study.ranked[:2]
    if not study.comparable(first, second):
        return " No row is."
    difference = percent(study.difference(first, second), sign=True)
    p_value = p_text(study.p_value(first, second))
    return f" No row is: the highest, {first.label}, is {difference} from the next, {second.label} (p = {p_value})."


def _hole_notes(row: Row) -> list[str]:
    if row.cell is None:
        return [f"{row.label}: not run."]
    seeds: dict[str, list[Any]] = {}
    for record in row.cell.failed:
        seeds.setdefault(failure(record), []).append(seed(record))
    if row.absent:
        seeds["not run"] = list(row.absent)
    return [f"{row.label}, seed{'s' * (len(some) > 1)} {_listed(some)}: {why}." for why, some in seeds.items()]


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def _seeds(row: Row, study: Study) -> str:
    finished, wanted = len(row.cell.finished) if row.cell else 0, len(study.seeds)
    return str(finished) if finished == wanted else f"{finished} of {wanted}"


def _tokens(cell: Cell) -> float:
    return float(np.mean([_record_tokens(record) for record in cell.finished]))


def _record_tokens(record: Record) -> float:
    return record["model"].get("visual_tokens_mean", record["model"]["visual_tokens"])


def _varied(study: Study) -> list[str]:
    """The keys that get a column: single values that differ between rows. Of a group whose name differs only that, and
    the size is seen in the tokens; the CSV has all."""
    values = [row.setting.values for row in study.rows]
    differing = [key for key in study.definition.keys if any(some[key] != values[0][key] for some in values)]
    named = {key.removesuffix("name") for key in differing if key.endswith(".name")}
    return [
        key
        for key in differing
        if key != "compressor.size"
        and (key.endswith(".name") or not key.startswith(tuple(named)))
        and not any(isinstance(some[key], (list, Mapping)) for some in values)
    ]


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return NONE if value is None else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _task(study: Study) -> str | None:
    """What the rows' printed values are by for these data, None where the paper has none."""
    name = str(study.config.get("data.name", "")).lower()
    return name if any(name in paper for row in study.rows for paper in row.setting.paper) else None


def _shared(row: Row, task: str) -> float | None:
    """The value that the paper prints in a row; None where it prints none, or several since rows coincide."""
    values = {paper.get(task) for paper in row.setting.paper}
    return values.pop() if len(values) == 1 else None
