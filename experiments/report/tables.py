"""Tables of a report: numbers for CSV, and the same cells as text for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from experiments.report.cells import Cell
from experiments.report.numerals import NONE, milliseconds, p_text, percent, quantity
from experiments.report.records import Record, Records, describe, failure, outcomes, seed
from experiments.report.statistics import Interval, accuracy_interval
from experiments.report.verdict import Verdict, curves_of, depth_text


@dataclass(frozen=True)
class Table:
    """A table twice over: `data` holds plain numbers (accuracies and differences from 0 to 1), `text` what is shown.

    `numeric` are the columns of `text` that are set flush right; `notes` go below; `bold` are cells of `text`, each as
    row and column.
    """

    name: str
    caption: str
    data: pd.DataFrame
    text: pd.DataFrame
    numeric: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    bold: frozenset[tuple[int, str]] = frozenset()

    @property
    def holes(self) -> frozenset[int]:
        """Rows of what failed or was not run."""
        return frozenset(
            i for i, row in enumerate(self.text.itertuples(index=False)) if {"failed", "not run"} & set(row)
        )


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


LATENCY = "Latency (ms)"
_REST = ("n", "Seeds", "Difference", "p", "FLOPs", LATENCY, "Parameters")


def fusion_table(verdicts: Sequence[Verdict], failed: Sequence[Record]) -> Table:
    """Fusion depth of every probed record, from each curve, with the rule's answer."""
    data, text, reasons = [], [], []
    for verdict in verdicts:
        record = verdict.record
        for kind in curves_of(record):
            depth = (record.get("fusion") or {}).get(kind)
            has_depth = depth is not None and depth["depth"] is not None
            if not has_depth:
                reasons.append(f"{describe(record)}, {kind}: {depth_text(record, kind)}.")
            depth = depth or {}
            row = {"model": record["name"], "seed": seed(record), "kind": kind, "verdict": verdict.answer}
            keys = ("depth", "low", "high", "layers", "threshold", "samples")
            data.append({**row, **{key: depth.get(key) for key in keys}})
            text.append(
                {
                    "Model": record["name"],
                    "Seed": _shown(seed(record)),
                    "Measured by": kind,
                    "Fusion depth": f"{depth['depth']} of {depth['layers']}"
                    if has_depth
                    else shorten(depth_text(record, kind)),
                    "95% CI": f"{depth['low']:g} to {depth['high']:g}" if has_depth else NONE,
                    "Threshold": _shown(depth.get("threshold")),
                    "n": _shown(depth.get("samples")),
                    "Verdict": verdict.answer,
                }
            )
    for record in failed:
        data.append({"model": record["name"], "seed": seed(record), "verdict": failure(record)})
        rest = dict.fromkeys(("Measured by", "95% CI", "Threshold", "n", "Verdict"), "failed")
        text.append(
            {"Model": record["name"], "Seed": _shown(seed(record)), "Fusion depth": shorten(failure(record)), **rest}
        )
    notes = (
        "Depth is counted in layers of the language model. Removal: the number of first layers that must see the "
        "visual tokens for the model to keep the threshold's share of its gain over never seeing them. Attention: the "
        "number of first layers that hold the threshold's share of all attention on visual tokens. Knock-out: the number "
        "of first layers that hold its share of what is lost when text is cut off from vision, window by window. "
        "Read-out: the number of layers after which a linear classifier reads the answer off the question's states, by "
        "its share of the most that it ever gains over the question's words.",
        "Intervals: 95% bootstrap over examples.",
        *reasons,
        *(f"{describe(record)}: {failure(record)}." for record in failed),
    )
    columns = ["Model", "Seed", "Measured by", "Fusion depth", "95% CI", "Threshold", "n", "Verdict"]
    shown = pd.DataFrame(text, columns=columns)
    return Table("fusion_depth", "Fusion depth of every probed model.", pd.DataFrame(data), shown, ("Seed", "n"), notes)


def provenance_table(records: Records) -> Table:
    """Where every record comes from."""
    keys = ("commit", "code", "torch", "transformers", "python", "device", "started", "seconds", "train_seconds")
    data = []
    for record in (*records.finished, *records.failed):
        provenance = record.get("provenance") or {}
        row = {"record": record["id"], "name": record["name"], "seed": seed(record), "status": record["status"]}
        fingerprint = (record.get("data") or {}).get("fingerprint")
        data.append({**row, "data": fingerprint, **{key: provenance.get(key) for key in keys}})
    frame = pd.DataFrame(data)
    shown = frame.astype(object).where(frame.notna(), NONE).astype(str)
    for key in ("commit", "code", "data"):
        shown[key] = shown[key].str[:8] if len(shown) else shown[key]
    shown.columns = [column.replace("_", " ").capitalize() for column in shown.columns]
    caption = "Provenance of every record (commit, code and data shortened to 8 characters)."
    return Table("provenance", caption, frame, shown, ("Seed", "Seconds", "Train seconds"))


def shorten(reason: str) -> str:
    """A reason short enough for a cell of a table; the notes below hold the whole of it."""
    return reason if len(reason) <= 36 else f"{reason[:33].rstrip()}..."


def _shown(value: float | None) -> str:
    return NONE if value is None else f"{value:g}"


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


def cell_name(cell: Cell) -> str:
    if cell.is_baseline:
        name = f"{cell.label}, {cell.visual_tokens} tokens"
    else:
        tokens = "token" if cell.visual_tokens == 1 else "tokens"
        name = f"{cell.label}, {cell.compressor}, {cell.visual_tokens} {tokens}, {cell.prefusion_layers} pre-fusion"
    return f"{name}, {cell.settings}" if cell.settings else name


def bounds(name: str, interval: Interval | None) -> dict[str, float | None]:
    """Three columns of a table's data: the mean under `name`, and its bounds."""
    values = (None, None, None) if interval is None else interval
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))
