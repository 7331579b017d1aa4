"""Blind-controls table: a model's accuracy with the image against its accuracy without it."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from experiments.records.views import Record, parse_outcomes, record_label
from experiments.report.formatting import ACCURACY_DEFINITION, EXACT_MATCH, format_interval, format_p_value
from experiments.report.statistics import accuracy_interval, difference_interval, holm, paired_test
from experiments.report.tables.table import Table, data_frame, interval_columns

_CONTROLS = {"blank": "grey image", "shuffled": "another question\u2019s image", "guess": "text-only guess"}
_COLUMNS = (
    *("model", "control", "examples", "picture", "picture_low", "picture_high"),
    *("without", "without_low", "without_high", "difference", "difference_low", "difference_high", "p_holm"),
)


def blind_controls_table(probed: Sequence[Record]) -> Table:
    """Build the table that compares every probed record with each of its blind controls on the same questions.

    Args:
        probed: Finished records with a probe.
    """
    data, text = [], []
    for record in probed:
        answers = {**record["accuracy"], "guess": record["data"].get("guess")}
        image = parse_outcomes(answers["image"])[None]
        controls = {name: parse_outcomes(answers[name])[None] for name in _CONTROLS if answers.get(name) is not None}
        p_values = holm([paired_test(image, control) for control in controls.values()])
        for (name, control), p_value in zip(controls.items(), p_values, strict=True):
            with_image, without_image = accuracy_interval(image), accuracy_interval(control)
            difference = difference_interval(image, control)
            row = {"model": record["name"], "control": name, "examples": image.shape[1]}
            # These column names of the CSV are part of the file format.
            row |= interval_columns("picture", with_image)
            row |= interval_columns("without", without_image)
            row |= interval_columns("difference", difference)
            data.append({**row, "p_holm": p_value})
            text.append(
                {
                    "Model": record_label(record),
                    "n": str(image.shape[1]),
                    "Image (%)": format_interval(with_image),
                    "Control": _CONTROLS[name],
                    "Control (%)": format_interval(without_image),
                    "Difference": format_interval(difference, sign=True),
                    "p": format_p_value(p_value),
                }
            )
    columns = ["Model", "n", "Image (%)", "Control", "Control (%)", "Difference", "p"]
    guesses = sorted({record["data"].get("guess_note") for record in probed} - {None})
    notes = (
        f"{ACCURACY_DEFINITION} With the question's own image, against three controls on the same questions: a grey image, the "
        "image of another question, and a guess from the question's text alone. 95% bootstrap intervals over examples, paired for "
        "the difference (percentage points). p: exact paired randomisation test, Holm-corrected over a model's controls.",
        *(f"Text-only guess: {note}." for note in guesses),
    )
    text_frame = pd.DataFrame(text, columns=columns)
    numeric = tuple(column for column in columns if column not in ("Model", "Control"))
    caption = f"Blind controls: does the model use the image? Accuracy ({EXACT_MATCH}) with it and without."
    return Table("sight", caption, data_frame(data, _COLUMNS), text_frame, numeric, notes)
