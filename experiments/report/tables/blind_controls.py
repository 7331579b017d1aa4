"""Does a model use the picture? Its answers against those to the same questions without it."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from experiments.records.views import Record, describe, outcomes
from experiments.report.formatting import p_text, percent
from experiments.report.statistics import accuracy_interval, difference_interval, holm, paired_test
from experiments.report.tables.table import Table, bounds

_WITHOUT = {"blank": "grey picture", "shuffled": "another\u2019s picture", "guess": "text-only guess"}


def sight_table(probed: Sequence[Record]) -> Table:
    """Every probed record against each control that it has, on the same questions."""
    data, text = [], []
    for record in probed:
        answers = {**record["accuracy"], "guess": record["data"].get("guess")}
        image = outcomes(answers["image"])[None]
        controls = {name: outcomes(answers[name])[None] for name in _WITHOUT if answers.get(name) is not None}
        p_values = holm([paired_test(image, control) for control in controls.values()])
        for (name, control), p_value in zip(controls.items(), p_values, strict=True):
            right = {"picture": accuracy_interval(image), "without": accuracy_interval(control)}
            difference = difference_interval(image, control)
            row = {"model": record["name"], "control": name, "examples": image.shape[1]}
            for view, interval in (*right.items(), ("difference", difference)):
                row |= bounds(view, interval)
            data.append({**row, "p_holm": p_value})
            text.append(
                {
                    "Model": describe(record),
                    "n": str(image.shape[1]),
                    "Picture (%)": percent(right["picture"]),
                    "Control": _WITHOUT[name],
                    "Control (%)": percent(right["without"]),
                    "Difference": percent(difference, sign=True),
                    "p": p_text(p_value),
                }
            )
    columns = ["Model", "n", "Picture (%)", "Control", "Control (%)", "Difference", "p"]
    guesses = sorted({record["data"].get("guess_note") for record in probed} - {None})
    notes = (
        "Accuracy with its picture against the same questions without it: about a grey picture, about the picture of "
        "another question, and answered from the question's text alone. 95% bootstrap intervals over examples, paired for "
        "the difference (percentage points). p: exact paired randomisation test, Holm-corrected over a model's controls.",
        *(f"Text-only guess: {note}." for note in guesses),
    )
    shown = pd.DataFrame(text, columns=columns)
    numeric = tuple(column for column in columns if column not in ("Model", "Control"))
    return Table("sight", "Does the model use the picture?", pd.DataFrame(data), shown, numeric, notes)
