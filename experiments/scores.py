"""Scores by question kind, as a cell says them when it is done."""

from __future__ import annotations

from typing import Any

import pandas as pd


def by_kind(record: dict[str, Any]) -> str:
    """Percent right by question kind: with the picture, under each control, and by guessing from the text alone."""
    views = {**record["accuracy"]} | ({"text-only guess": record["data"]["guess"]} if "guess" in record["data"] else {})
    right = pd.DataFrame({name: [100 * int(digit) for digit in digits] for name, digits in views.items()})
    grouped = right.groupby(pd.Series(record["data"]["kinds"], name="kind"))
    table = pd.concat([grouped.size().rename("n"), grouped.mean()], axis=1)
    table.loc["all"] = [len(right), *right.mean()]
    table["n"] = table["n"].astype(int)
    return table.round(1).to_string()
