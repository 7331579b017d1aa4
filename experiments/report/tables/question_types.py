"""Tables by question type: accuracy, and accuracy with visual tokens removed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments.records.views import Record, parse_outcomes, record_label
from experiments.report.formatting import EXACT_MATCH, NONE, format_interval
from experiments.report.run_groups import RunGroup, name_differing_settings
from experiments.report.statistics import accuracy_interval
from experiments.report.tables.table import Table, data_frame, group_name, interval_columns

_REMOVAL_COLUMNS = {
    "whole": "Vision in all layers",
    "first": "Vision hidden in the first block",
    "never": "Vision hidden in all layers",
}
"""Column of the text by the CSV's column: accuracy with visual tokens removed from some layers."""

_ACCURACY_COLUMNS = ("model", "input", "seeds", "all", "all_low", "all_high", "all_n")
_REMOVAL_DATA_COLUMNS = (
    *("model", "kind", "examples", "whole", "whole_low", "whole_high", "never", "never_low", "never_high"),
    *("first", "first_low", "first_high", "depth", "low", "high", "layers"),
)


def question_type_table(groups: Sequence[RunGroup], probed: Sequence[Record]) -> Table:
    """Build the table of accuracy by question type: every run group, then each probed model with its blind controls.

    Args:
        groups: Run groups that were compared with each other.
        probed: Finished records with a probe.
    """
    rows: list[tuple[str, str, int, Sequence[str], np.ndarray]] = []
    shown = set()
    for group in name_differing_settings(groups):
        matrix = group.outcomes()
        if matrix is None or (same := (group_name(group), matrix.tobytes())) in shown:
            continue  # groups that differ in settings without effect alone have one name and one result
        shown.add(same)
        rows.append((group_name(group), "image", len(matrix), group.finished[0]["data"]["kinds"], matrix))
    for record in probed:
        types = record["data"]["kinds"]
        views = {**record["accuracy"], "text-only guess": record["data"].get("guess")}
        for view, text in views.items():
            if text is not None:
                rows.append((record_label(record), view, 1, types, parse_outcomes(text)[None]))
    names = sorted({name for *_, types, _ in rows for name in types})
    of_types = _type_columns(names)
    data, texts = [], []
    for model, view, seeds, types, matrix in rows:
        row: dict[str, Any] = {"model": model, "input": view, "seeds": seeds}
        cells = {"Model": model, "Input": view, "Seeds": str(seeds)}
        type_of_example = np.array(types)
        columns = (
            ("all", "All", np.ones(len(type_of_example), bool)),
            *((key, heading, type_of_example == name) for name, (key, heading) in zip(names, of_types, strict=True)),
        )
        for key, heading, in_column in columns:
            interval = accuracy_interval(matrix[:, in_column]) if in_column.any() else None
            row |= dict(zip(_data_columns(key), (*(interval or (None,) * 3), int(in_column.sum())), strict=True))
            cells[heading] = format_interval(interval) if interval else NONE
        data.append(row)
        texts.append(cells)
    numeric = ("Seeds", "All", *(heading for _, heading in of_types))
    counts = {tuple((name, list(types).count(name)) for name in names) for *_, types, _ in rows}
    notes = tuple("Examples: " + ", ".join(f"{name} {n}" for name, n in count) + "." for count in sorted(counts))
    caption = f"Accuracy ({EXACT_MATCH}, %) by question type, with 95% bootstrap intervals over examples and seeds."
    return Table("accuracy_by_kind", caption, data_frame(data, _ACCURACY_COLUMNS), pd.DataFrame(texts), numeric, notes)


def _type_columns(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the column of each question type in the data and its heading, distinct from each other and the fixed ones.

    A type whose name is taken gets an addition: a type "model" has the columns "model (type)" and "Model (type)".
    """
    fixed = ("Model", "Input", "Seeds", "All")
    taken_keys, taken_headings = set(_ACCURACY_COLUMNS), set(fixed)
    found = []
    for name in names:
        additions = ("", " (type)", *(f" (type {number})" for number in range(2, len(names) + 3)))
        key = next(name + end for end in additions if taken_keys.isdisjoint(_data_columns(name + end)))
        as_written = () if name.capitalize() in fixed else (name,)
        headings = (name.capitalize(), *as_written, *(name.capitalize() + end for end in additions[1:]))
        heading = next(heading for heading in headings if heading not in taken_headings)
        taken_keys.update(_data_columns(key))
        taken_headings.add(heading)
        found.append((key, heading))
    return found


def _data_columns(key: str) -> tuple[str, ...]:
    """Return the four columns of the data that belong to one column of the text."""
    return (*interval_columns(key, None), f"{key}_n")


def removal_by_question_type_table(probed: Sequence[Record]) -> Table:
    """Build the table of accuracy by question type with visual tokens removed.

    Args:
        probed: Finished records with a probe; those without removal by question type are skipped.
    """
    data, text = [], []
    for record in probed:
        removal = record.get("removal")
        if removal is None or not removal.get("by_kind"):
            continue
        types = np.array(record["data"]["kinds"])
        runs = {
            "whole": removal["onward"][-1],
            "never": removal["onward"][0],
            "first": removal["inside"][0],
        }
        correct = {name: parse_outcomes(run["correct"]) for name, run in runs.items()}
        for type_name, depth in sorted(removal["by_kind"].items()):
            in_type = types == type_name
            intervals = {name: accuracy_interval(outcomes[None, in_type]) for name, outcomes in correct.items()}
            has_depth = depth["depth"] is not None
            row: dict[str, Any] = {"model": record["name"], "kind": type_name, "examples": int(in_type.sum())}
            for name, interval in intervals.items():
                row |= interval_columns(name, interval)
            data.append({**row, **{key: depth[key] for key in ("depth", "low", "high", "layers")}})
            text.append(
                {
                    "Model": record_label(record),
                    "Question type": type_name,
                    "n": str(row["examples"]),
                    **{column: format_interval(intervals[name]) for name, column in _REMOVAL_COLUMNS.items()},
                    "Fusion depth": f"{depth['depth']} of {depth['layers']}" if has_depth else "none",
                    "95% CI": f"{depth['low']:g} to {depth['high']:g}" if has_depth else NONE,
                }
            )
    columns = ["Model", "Question type", "n", *_REMOVAL_COLUMNS.values(), "Fusion depth", "95% CI"]
    notes = (
        "Accuracy (%) with 95% bootstrap intervals over examples. The visual tokens are visible in all layers of the "
        "language model, hidden in the first block of layers, or hidden in all layers. Fusion depth: by removal, as in "
        "the table of fusion depths; none if it is not shown that the answers depend on the image.",
    )
    numeric = ("n", *_REMOVAL_COLUMNS.values(), "Fusion depth")
    text_frame = pd.DataFrame(text, columns=columns)
    caption = f"Accuracy ({EXACT_MATCH}) by question type with visual tokens removed."
    return Table("removal_by_kind", caption, data_frame(data, _REMOVAL_DATA_COLUMNS), text_frame, numeric, notes)
