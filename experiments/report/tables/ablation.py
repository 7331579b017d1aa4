"""Tables of a report: numbers for CSV, and the same cells as text for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments.records.views import outcomes
from experiments.report.formatting import NONE, milliseconds, p_text, percent, quantity
from experiments.report.run_groups import Cell
from experiments.report.statistics import accuracy_interval
from experiments.report.tables.table import LATENCY, Table, bounds, cell_name, shorten


def ablation_table(cells: Sequence[Cell]) -> Table:
    """One row for each ablation cell over its seeds, then the controls of each baseline."""
    data, text = [], []
    for cell in cells:
        row: dict[str, Any] = {
            "model": cell.label,
            "visual_tokens": cell.visual_tokens,
            "prefusion_layers": cell.prefusion_layers,
            "compressor": cell.compressor,
            "settings": cell.settings,
        }
        shown = {
            "Model": cell.label,
            "Tokens": "unknown" if cell.visual_tokens is None else str(cell.visual_tokens),
            "Pre-fusion": str(cell.prefusion_layers),
            "Compressor": cell.compressor,
            "Settings": cell.settings or NONE,
        }
        if cell.accuracy is None:
            data.append({**row, "status": cell.failures})
            text.append({**shown, "Accuracy (%)": shorten(cell.failures), **dict.fromkeys(_REST, "failed")})
            continue
        parameters = float(np.mean([record["model"]["parameters"] for record in cell.finished]))
        data.append(
            {
                **row,
                **bounds("accuracy", cell.accuracy),
                "examples": cell.examples,
                "seeds": len(cell.finished),
                **bounds("difference", cell.difference),
                "p_holm": cell.p_value,
                "flops": cell.flops,
                "cache_bytes": cell.cache_bytes,
                "latency_seconds": cell.latency,
                "parameters": parameters,
                "status": cell.failures or "finished",
            }
        )
        text.append(
            {
                **shown,
                "Accuracy (%)": percent(cell.accuracy),
                "n": str(cell.examples),
                "Seeds": _seeds(cell),
                "Difference": percent(cell.difference, sign=True) if cell.difference else cell.comparison,
                "p": p_text(cell.p_value) if cell.p_value is not None else cell.comparison,
                "FLOPs": quantity(cell.flops),
                LATENCY: milliseconds(cell.latency),
                "Parameters": quantity(parameters),
            }
        )
    for control in _controls(cells):
        data.append({**control[0], "status": "control"})
        text.append(control[1])
    columns = pd.DataFrame(text)
    if len(columns) and (columns["Settings"] == NONE).all():
        columns = columns.drop(columns="Settings")
    numbers, timed = pd.DataFrame(data), [cell for cell in cells if cell.latency > 0]
    if not timed:
        numbers, columns = (
            frame.drop(columns=[LATENCY, "latency_seconds"], errors="ignore") for frame in (numbers, columns)
        )
    conventions = sorted(
        {r["cost"].get("convention") or "unstated" for c in cells for r in c.finished if r.get("cost")}
    )
    notes = (
        "Accuracy: mean over n examples and the seeds, with its 95% bootstrap interval over both; with few seeds it "
        "understates how much seeds differ.",
        "Difference: percentage points from the LLaVA trained alike (no compressor, no pre-fusion) on the same "
        "examples, with its 95% interval. p: exact paired randomisation test over examples, Holm-corrected over the "
        "rows compared; it speaks of these trained models, not of other seeds.",
        "Tokens: visual tokens the language model reads. Pre-fusion: layers before the language model.",
        *(f"FLOPs of one prompt: {convention}." for convention in conventions),
        *(f"Latency: {note}." for note in sorted({cell.finished[0]["cost"]["latency_note"] for cell in timed})),
        *_guess_notes(cells),
        *(f"{cell_name(cell)}: {cell.failures}." for cell in cells if cell.failed),
    )
    numeric = ("Tokens", "Pre-fusion", "Accuracy (%)", *_REST)
    return Table("ablation", "Ablation: accuracy and cost of every configuration.", numbers, columns, numeric, notes)


_REST = ("n", "Seeds", "Difference", "p", "FLOPs", LATENCY, "Parameters")


def _seeds(cell: Cell) -> str:
    finished = len(cell.finished)
    return f"{finished} of {finished + len(cell.failed)}" if cell.failed else str(finished)


def _controls(cells: Sequence[Cell]) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """Rows for the text-only guess and the blank image of every baseline (of the first cell, where there is none)."""
    finished = [cell for cell in cells if cell.finished]
    chosen = [cell for cell in finished if cell.is_baseline] or finished[:1]
    rows = []
    for cell in chosen:
        guess, blank = cell.finished[0]["data"].get("guess"), cell.outcomes("blank")
        found = {
            "Text-only guess": None if guess is None else outcomes(guess)[None],
            f"{cell.label}, blank image": blank,
        }
        for name, matrix in found.items():
            row: dict[str, Any] = {"model": name, "settings": cell.settings}
            shown = {"Model": name, "Settings": cell.settings or NONE}
            shown |= dict.fromkeys(("Tokens", "Pre-fusion", "Compressor"), NONE)
            if matrix is None:
                shown |= {"Accuracy (%)": "not recorded", **dict.fromkeys(_REST, NONE)}
            else:
                seeds, examples = matrix.shape
                interval = accuracy_interval(matrix)
                row |= {**bounds("accuracy", interval), "examples": examples, "seeds": seeds}
                shown |= {"Accuracy (%)": percent(interval), **dict.fromkeys(_REST, NONE)}
                shown |= {"n": str(examples), "Seeds": str(seeds) if "blank" in name else NONE}
            rows.append((row, shown))
    return rows


def _guess_notes(cells: Sequence[Cell]) -> list[str]:
    notes = {record["data"].get("guess_note") for cell in cells for record in cell.finished} - {None}
    return [f"Text-only guess: {note}." for note in sorted(notes)]
