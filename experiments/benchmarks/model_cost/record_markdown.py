"""Markdown tables of one record of measured costs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from experiments.benchmarks.model_cost.records import COMPONENTS, CostRecord, CostSetting, MeasuredModel, time_ratios
from experiments.markdown import markdown_table
from llava_mini.visual_layout import crops_per_frame

MIB, GIB = 2**20, 2**30


def cost_record_markdown(record: CostRecord) -> str:
    """Return a table of whole answers, a table of their components in time and FLOPs, and notes on what was measured."""
    cost, rows = record["cost"], record["rows"]
    first_token_ratios, decode_ratios = time_ratios(record, "first token"), time_ratios(record, "decode")
    answer_rows, component_rows = [], []
    for row in rows:
        key = row["model"], row["frames"]
        sizes = [row["model"], *(f"{row[name]:,}" for name in ("frames", "visual_tokens"))]
        sizes.append(f"{MeasuredModel(row, None).flops / 1e12:,.3g}")
        estimate = f"{row['cache_estimate'] / MIB:,.2f}"
        if row["seconds"] is None:
            reason = f"not run: needs about {row['needs']['total'] / GIB:,.3g} GiB"
            answer_rows.append([*sizes, reason, "", "", "", "", "", f"({estimate})", ""])
            continue
        times = row["seconds"]
        prefill = [a + b for a, b in zip(times["prefill"], times["head"], strict=True)]
        tokens_per_second = 1 / statistics.median(times["decode"])
        answer_rows.append(
            [
                *(*sizes, _milliseconds(times["first token"]), str(first_token_ratios[key] or "")),
                *(_milliseconds(prefill), f"{tokens_per_second:,.1f}", str(decode_ratios[key] or "")),
                f"{row['cache_bytes'] / MIB:,.2f} ({estimate})",
                " / ".join(f"{peak / MIB:,.0f}" for peak in row["memory"].values()),
                f"{row['needs']['weights'] / MIB:,.0f}",
            ]
        )
        components = [
            f"{1000 * statistics.median(times[part]):,.2f} ({row['flops'][part] / 1e9:,.3g})" for part in COMPONENTS
        ]
        component_rows.append([row["model"], f"{row['frames']:,}", *components])
    memory = "peak MiB: " + ", ".join(next((list(row["memory"]) for row in rows if row["memory"]), ["resident"]))
    columns = ["model", "frames", "visual tokens", "TFLOPs", "first token, ms", "LLaVA's / this", "prefill, ms"]
    columns += ["tokens/s", "this / LLaVA's", "cache MiB (estimate)", memory, "weights MiB"]
    component_columns = ["model", "frames", *(f"{name}, ms (GFLOPs)" for name in COMPONENTS.values())]
    setting = CostSetting.of(record)
    notes = (
        f"Geometry {setting}, random weights; {setting.text} text tokens, {cost['answer']} generated, "
        f"{setting.layers} pre-fusion layers{_tiles_note(setting.tiles)}; all models on the same weights, in turns, "
        f"medians of {cost['repeats']} rounds after one that does not count; in brackets the lowest and the highest round.",
        "First token: time from the images to it, with all frames equal. Prefill: the language model's part of it, with "
        "its head on the last token only. TFLOPs: the estimate up to the first token, attention included. Peak memory: "
        "of weights, images and an answer in a separate process.",
    )
    tables = [
        markdown_table(columns, answer_rows, columns[1:]),
        "",
        markdown_table(component_columns, component_rows, component_columns[1:]),
    ]
    return "\n".join([*tables, *(f"\n{note}" for note in notes)]) + "\n"


def _milliseconds(seconds: Sequence[float]) -> str:
    median, least, most = (1000 * value for value in (statistics.median(seconds), min(seconds), max(seconds)))
    return f"{median:,.1f} ({least:,.1f} to {most:,.1f})"


def _tiles_note(tiles: int) -> str:
    if tiles == 1:
        return ""
    return (
        f"; each frame is {tiles} x {tiles} tiles and the whole frame, which LLaVA takes as {crops_per_frame(tiles)} "
        "images and LLaVA-Mini as one, compressed from its tiles"
    )
