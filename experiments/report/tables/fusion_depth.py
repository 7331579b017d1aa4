"""Fusion-depth table: the depth of every probed model from each curve."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from experiments.records.views import Record, failure_reason, record_label, record_seed
from experiments.report.formatting import NONE
from experiments.report.fusion_depths import depth_is_of_a_loss, depth_text, reported_curves
from experiments.report.tables.table import Table, data_frame, format_optional, shorten_reason

_LABELS = ("model", "seed", "kind")
_DEPTH_KEYS = ("depth", "low", "high", "layers", "threshold", "samples")


def fusion_depth_table(probed: Sequence[Record], failed: Sequence[Record]) -> Table:
    """Build the table of fusion depths.

    Args:
        probed: Finished records with a probe.
        failed: Failed records of attention experiments.
    """
    data, text, reasons = [], [], []
    for record in probed:
        for curve in reported_curves(record):
            depth = (record.get("fusion") or {}).get(curve)
            has_depth = depth is not None and depth["depth"] is not None
            if not has_depth or depth_is_of_a_loss(record, curve):
                reasons.append(f"{record_label(record)}, {curve}: {depth_text(record, curve)}.")
            depth = depth or {}
            row = {"model": record["name"], "seed": record_seed(record), "kind": curve}
            data.append({**row, **{key: depth.get(key) for key in _DEPTH_KEYS}})
            text.append(
                {
                    "Model": record["name"],
                    "Seed": format_optional(record_seed(record)),
                    "Measured by": curve,
                    "Fusion depth": f"{depth['depth']} of {depth['layers']}"
                    if has_depth
                    else shorten_reason(depth_text(record, curve)),
                    "95% CI": f"{depth['low']:g} to {depth['high']:g}" if has_depth else NONE,
                    "Threshold": format_optional(depth.get("threshold")),
                    "n": format_optional(depth.get("samples")),
                }
            )
    for record in failed:
        data.append({"model": record["name"], "seed": record_seed(record)})
        text.append(
            {
                "Model": record["name"],
                "Seed": format_optional(record_seed(record)),
                "Fusion depth": shorten_reason(failure_reason(record)),
                **dict.fromkeys(("Measured by", "95% CI", "Threshold", "n"), "failed"),
            }
        )
    notes = (
        "Depth is counted in layers of the language model. Removal: the number of first layers that must attend to the "
        "visual tokens for the model to keep the threshold's share of its gain over never attending to them. Attention: "
        "the number of first layers that hold the threshold's share of all attention on visual tokens. Knock-out: the "
        "number of first layers that hold the threshold's share of the accuracy lost when text is cut off from vision, "
        "window by window. Read-out: the number of layers after which a linear classifier reads the answer off the "
        "question's states, by the threshold's share of its largest gain over the question's words.",
        "Intervals: 95% bootstrap over examples.",
        *reasons,
        *(f"{record_label(record)}: {failure_reason(record)}." for record in failed),
    )
    columns = ["Model", "Seed", "Measured by", "Fusion depth", "95% CI", "Threshold", "n"]
    text_frame = pd.DataFrame(text, columns=columns)
    caption = "Fusion depth of every probed model."
    return Table("fusion_depth", caption, data_frame(data, (*_LABELS, *_DEPTH_KEYS)), text_frame, ("Seed", "n"), notes)
