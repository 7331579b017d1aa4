"""Knock-out table by question type: the window of layers in which text most needs to read the image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from experiments.records.views import Record, parse_outcomes, record_label
from experiments.report.formatting import EXACT_MATCH, format_interval
from experiments.report.statistics import accuracy_interval, difference_interval
from experiments.report.tables.table import Table, data_frame, interval_columns

_DATA_COLUMNS = (
    *("model", "kind", "examples", "first_layer", "last_layer", "intact", "intact_low", "intact_high"),
    *("lost", "lost_low", "lost_high"),
)
_TEXT_COLUMNS = ("Model", "Question type", "n", "Intact", "Layers of the largest loss", "Points lost")


def knockout_types_tables(probed: Sequence[Record]) -> tuple[Table, ...]:
    """Build the table of points lost when text is cut off from the image in some layers, by question type.

    Args:
        probed: Finished records with a probe; those without knock-out are skipped.

    Returns:
        The table alone, or nothing if no record has a knock-out.
    """
    data, text = [], []
    for record in probed:
        if record.get("knockout") is None:
            continue
        intact, *windows = record["knockout"]["windows"]
        kinds = np.array(record["data"]["kinds"])
        for name in sorted(set(kinds)):
            of_type = kinds == name
            whole = parse_outcomes(intact["correct"])[None, of_type]
            losses = [difference_interval(whole, parse_outcomes(run["correct"])[None, of_type]) for run in windows]
            accuracy = accuracy_interval(whole)
            data += [
                {
                    "model": record["name"],
                    "kind": name,
                    "examples": int(of_type.sum()),
                    "first_layer": min(run["layers"]) + 1,
                    "last_layer": max(run["layers"]) + 1,
                    **interval_columns("intact", accuracy),
                    **interval_columns("lost", loss),
                }
                for run, loss in zip(windows, losses, strict=True)
            ]
            largest = max(range(len(losses)), key=lambda number: losses[number].mean)
            layers = [layer + 1 for layer in windows[largest]["layers"]]
            cells = (
                record_label(record),
                name,
                str(of_type.sum()),
                format_interval(accuracy),
                f"{min(layers)} to {max(layers)}" if len(layers) > 1 else str(layers[0]),
                format_interval(losses[largest], sign=True),
            )
            text.append(dict(zip(_TEXT_COLUMNS, cells, strict=True)))
    if not text:
        return ()
    notes = (
        "Points lost: accuracy of the intact model minus that with all text cut off from the image in these layers, with "
        "its 95% bootstrap interval over questions. The layers with the largest loss are chosen by these questions, so "
        "where hardly any layer matters, the loss is a little too large. The CSV has every window.",
    )
    caption = f"Knock-out by question type: the layers whose loss costs most. Accuracy is {EXACT_MATCH} (%)."
    text_frame = pd.DataFrame(text, columns=_TEXT_COLUMNS)
    numeric = ("n", "Intact", "Points lost")
    return (Table("knockout_by_kind", caption, data_frame(data, _DATA_COLUMNS), text_frame, numeric, notes),)
