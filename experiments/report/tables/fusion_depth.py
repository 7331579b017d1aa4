"""TODO"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from experiments.records.views import Record, describe, failure, seed
from experiments.report.formatting import NONE
from experiments.report.tables.table import Table, _shown, shorten
from experiments.report.verdict import Verdict, curves_of, depth_text


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
