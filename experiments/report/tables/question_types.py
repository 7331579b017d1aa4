"""Tables by kind of question: what is right, and where the picture is needed for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments.records.views import Record, describe, outcomes
from experiments.report.formatting import NONE, percent
from experiments.report.run_groups import Cell
from experiments.report.statistics import accuracy_interval
from experiments.report.tables.table import Table, bounds, cell_name


def kinds_table(cells: Sequence[Cell], probed: Sequence[Record]) -> Table:
    """Accuracy by kind of question: every ablation cell, then each probed model with its controls."""
    rows: list[tuple[str, str, int, Sequence[str], np.ndarray]] = []
    for cell in cells:
        found = cell.outcomes()
        if found is not None:
            kinds = cell.finished[0]["data"]["kinds"]
            rows.append((cell_name(cell), "image", len(found), kinds, found))
    for record in probed:
        kinds = record["data"]["kinds"]
        views = {**record["accuracy"], "text-only guess": record["data"].get("guess")}
        for view, text in views.items():
            if text is not None:
                rows.append((describe(record), view, 1, kinds, outcomes(text)[None]))
    names = sorted({kind for *_, kinds, _ in rows for kind in kinds})
    data, text = [], []
    for model, view, seeds, kinds, found in rows:
        row: dict[str, Any] = {"model": model, "input": view, "seeds": seeds}
        shown = {"Model": model, "Input": view, "Seeds": str(seeds)}
        of = np.array(kinds)
        for title, chosen in (("all", np.ones(len(of), bool)), *((name, of == name) for name in names)):
            interval = accuracy_interval(found[:, chosen]) if chosen.any() else None
            row |= {**bounds(title, interval), f"{title}_n": int(chosen.sum())}
            shown[title.capitalize()] = percent(interval) if interval else NONE
        data.append(row)
        text.append(shown)
    numeric = ("Seeds", "All", *(name.capitalize() for name in names))
    counts = {tuple((name, list(kinds).count(name)) for name in names) for *_, kinds, _ in rows}
    notes = tuple("Examples: " + ", ".join(f"{name} {n}" for name, n in count) + "." for count in sorted(counts))
    caption = "Accuracy (%) by kind of question, with 95% bootstrap intervals over examples and seeds."
    return Table("accuracy_by_kind", caption, pd.DataFrame(data), pd.DataFrame(text), numeric, notes)


def removal_kinds_table(probed: Sequence[Record]) -> Table:
    """What removal of visual tokens costs each kind of question, of every probed record that has it by kind."""
    data, text = [], []
    for record in probed:
        removal = record.get("removal")
        if removal is None or not removal.get("by_kind"):
            continue
        kinds = np.array(record["data"]["kinds"])
        runs = {
            "whole": removal["onward"][-1],
            "never": removal["onward"][0],
            "first": removal["inside"][0],
        }
        found = {name: outcomes(run["correct"]) for name, run in runs.items()}
        for kind, depth in sorted(removal["by_kind"].items()):
            some = {name: accuracy_interval(right[None, kinds == kind]) for name, right in found.items()}
            located = depth["depth"] is not None
            row: dict[str, Any] = {"model": record["name"], "kind": kind, "examples": int((kinds == kind).sum())}
            for name, interval in some.items():
                row |= bounds(name, interval)
            data.append({**row, **{key: depth[key] for key in ("depth", "low", "high", "layers")}})
            text.append(
                {
                    "Model": describe(record),
                    "Kind": kind,
                    "n": str(row["examples"]),
                    "All layers see": percent(some["whole"]),
                    "First block does not": percent(some["first"]),
                    "No layer sees": percent(some["never"]),
                    "Fusion depth": f"{depth['depth']} of {depth['layers']}" if located else "none",
                    "95% CI": f"{depth['low']:g} to {depth['high']:g}" if located else NONE,
                }
            )
    columns = ["Model", "Kind", "n", *_VIEWS, "Fusion depth", "95% CI"]
    notes = (
        "Accuracy (%) with 95% bootstrap intervals over examples; the visual tokens are seen in all layers of the language "
        "model, in all but the first block, or in none. Fusion depth: by removal, as in the table of fusion depths; none "
        "where these answers do not depend on the picture beyond chance.",
    )
    shown = pd.DataFrame(text, columns=columns)
    caption = "What removal of visual tokens costs each kind of question."
    return Table("removal_by_kind", caption, pd.DataFrame(data), shown, ("n", *_VIEWS, "Fusion depth"), notes)


_VIEWS = ("All layers see", "First block does not", "No layer sees")
