"""Fusion depths of records as texts, and the records that hold a probe."""

from __future__ import annotations

from experiments.records.files import Records
from experiments.records.views import Record, is_attention_experiment, parse_outcomes, percent_right, record_seed
from experiments.report.statistics import CONFIDENCE_LEVEL, paired_test

_ALWAYS_REPORTED = {"removal": True, "knockout": False, "readout": False, "attention": True}
"""Curves that give a fusion depth, and whether the report also names them if they were not measured."""


def probed_records(records: Records) -> tuple[Record, ...]:
    """Return the finished records with a probe: attention experiments first, then plain LLaVA, then by name."""
    probed = [
        r
        for r in records.finished
        if any(r.get(key) is not None for key in ("attention", "removal", "onset", "fusion"))
    ]
    return tuple(
        sorted(
            probed,
            key=lambda r: (
                not is_attention_experiment(r),
                not _is_plain_llava(r),
                r["name"],
                str(record_seed(r)),
                r["id"],
            ),
        )
    )


def reported_curves(record: Record) -> list[str]:
    """Return the curves whose fusion depth the report gives for a record."""
    measured = record.get("fusion") or {}
    return [curve for curve, always in _ALWAYS_REPORTED.items() if always or measured.get(curve) is not None]


def depth_text(record: Record, curve: str) -> str:
    """Describe the fusion depth from one curve.

    Args:
        record: A finished record.
        curve: "removal", "knockout", "readout" or "attention".
    """
    depth = (record.get("fusion") or {}).get(curve)
    if depth is None:
        return "not measured"
    if depth["depth"] is None:
        return f"none: {_why_no_depth(record, curve)}"
    reads = [layer for layer in depth.get("reads") or () if layer != depth["depth"]]
    layers = f", read at layer{'s' * (len(depth['reads']) > 1)} {', '.join(map(str, depth['reads']))}" if reads else ""
    interval = f"95% CI {depth['low']:g} to {depth['high']:g}, n = {depth['samples']}"
    loss = "; the image makes answers worse there" if depth_is_of_a_loss(record, curve) else ""
    return f"{depth['depth']} of {depth['layers']} layers ({interval}{layers}{loss})"


def depth_is_of_a_loss(record: Record, curve: str) -> bool:
    """Return whether the image makes answers worse, so that a depth is that of a loss and not of a gain.

    Args:
        record: A finished record.
        curve: "removal" or "knockout"; the other curves have no sign.
    """
    if curve == "removal" and record.get("removal"):
        right = percent_right(record["removal"]["onward"]).mean(axis=1)
        return bool(right[-1] < right[0])
    if curve == "knockout" and record.get("knockout"):
        right = percent_right(record["knockout"]["windows"]).mean(axis=1)
        return bool(right[1:].mean() > right[0])
    return False


def _is_plain_llava(record: Record) -> bool:
    return record["model"]["compressor"] == "none" and record["model"]["prefusion_layers"] == 0


def _why_no_depth(record: Record, curve: str) -> str:
    if curve == "attention":
        return "text does not attend to visual tokens"
    if curve == "readout":
        return "the question's states predict the answer no better than its words do"
    blank = record["accuracy"].get("blank")
    if record["model"]["prefusion_layers"] and blank is not None:
        image = parse_outcomes(record["accuracy"]["image"])[None]
        if paired_test(image, parse_outcomes(blank)[None]) < 1 - CONFIDENCE_LEVEL:
            return "the language model's layers need no visual tokens (the image reaches the text before them)"
    return "it is not shown that the answers depend on the image"
