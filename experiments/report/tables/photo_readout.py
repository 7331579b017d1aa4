"""Photo-readout table: what the vision features say about photographs in grids, beside what the model answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from experiments.records.views import Record, parse_outcomes, record_label
from experiments.report.formatting import NONE, format_interval
from experiments.report.statistics import Interval, accuracy_interval, contrast_interval
from experiments.report.tables.table import Table, data_frame, interval_columns

PLACE = "place"
_COLUMNS = (
    *("model", "grid_size", "photographs", "readout", "readout_low", "readout_high", "control"),
    *("questions", "answers", "answers_low", "answers_high", "share"),
)


def photo_readout_tables(records: Sequence[Record]) -> tuple[Table, ...]:
    """Build the table of photographs that a linear read-out of the vision features names right.

    Args:
        records: Finished records.

    Returns:
        The table alone, or nothing if no record has such a read-out.
    """
    data, text = [], []
    for record in records:
        for grid in (record.get("photo_readout") or {}).get("grids", ()):
            cells = grid["grid_size"] ** 2
            # Photographs of one image are no independent samples, so the interval is over images.
            right = parse_outcomes(grid["correct"]).reshape(-1, cells).sum(1)
            readout = Interval(*(value / cells for value in contrast_interval([(1, right[None])])))
            row = {
                "model": record["name"],
                "grid_size": grid["grid_size"],
                "photographs": grid["photographs"],
                **interval_columns("readout", readout),
                "control": float(parse_outcomes(grid["control"]).mean()),
            }
            shown = {
                "Model": record_label(record),
                "Grid": f"{grid['grid_size']} x {grid['grid_size']}",
                "Cells": f"{grid['photographs']:,}",
                "Linear read-out (%)": format_interval(readout),
                "Shuffled classes (%)": f"{100 * row['control']:.1f}",
            }
            one_size = len(record["photo_readout"]["grids"]) == 1
            places = np.array([kind == PLACE for kind in record["data"]["kinds"]])
            if one_size and places.any():
                answers = accuracy_interval(parse_outcomes(record["accuracy"]["image"])[None, places])
                share = answers.mean / readout.mean if readout.mean else float("nan")
                row |= {"questions": int(places.sum()), **interval_columns("answers", answers), "share": share}
                shown |= {
                    "Model's answers (%)": format_interval(answers),
                    "Share of the read-out (%)": f"{100 * share:.0f}",
                }
            data.append(row)
            text.append({"Model's answers (%)": NONE, "Share of the read-out (%)": NONE} | shown)
    if not data:
        return ()
    notes = (
        "Linear read-out: the share of photographs in grids that a linear classifier names right from the mean of their patches "
        "in the features that the projector reads, tested on photographs that it saw in no image of its training. Cells: photographs "
        "that were named; one may stand in several images. Model's answers: to "
        '"What is at row 1 column 2?" and its like. 95% bootstrap intervals over images.',
    )
    order = ["Model", "Grid", "Cells", "Linear read-out (%)", "Shuffled classes (%)", "Model's answers (%)"]
    text_frame = pd.DataFrame(text)[[*order, "Share of the read-out (%)"]]
    caption = "Photographs in grids: what the vision features tell, and what the model answers."
    return (
        Table("photo_readout", caption, data_frame(data, _COLUMNS), text_frame, tuple(text_frame.columns[1:]), notes),
    )
