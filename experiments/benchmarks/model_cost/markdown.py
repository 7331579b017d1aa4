"""A record of measured costs as Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from experiments.benchmarks.model_cost.records import PARTS, Measured, Record, Setting, ratios
from llava_mini.visual_layout import crops_of

MIB, GIB = 2**20, 2**30


def table(record: Record) -> str:
    """Markdown: what an answer takes; its parts in time and FLOPs; notes on what is measured."""
    cost, rows = record["cost"], record["rows"]
    first, decode = ratios(record, "first token"), ratios(record, "decode")
    whole, parts = [], []
    for row in rows:
        key = row["model"], row["frames"]
        shown = [row["model"], *(f"{row[name]:,}" for name in ("frames", "visual_tokens"))]
        shown.append(f"{Measured(row, None).flops / 1e12:,.3g}")
        estimate = f"{row['cache_estimate'] / MIB:,.2f}"
        if row["seconds"] is None:
            rest = f"not run: needs about {row['needs']['total'] / GIB:,.3g} GiB"
            whole.append([*shown, rest, "", "", "", "", "", f"({estimate})", ""])
            continue
        times = row["seconds"]
        prefill = [a + b for a, b in zip(times["prefill"], times["head"], strict=True)]
        rate = 1 / statistics.median(times["decode"])
        whole.append(
            [
                *(*shown, _milliseconds(times["first token"]), str(first[key] or ""), _milliseconds(prefill)),
                *(f"{rate:,.1f}", str(decode[key] or ""), f"{row['cache_bytes'] / MIB:,.2f} ({estimate})"),
                " / ".join(f"{taken / MIB:,.0f}" for taken in row["memory"].values()),
                f"{row['needs']['weights'] / MIB:,.0f}",
            ]
        )
        each = [f"{1000 * statistics.median(times[part]):,.2f} ({row['flops'][part] / 1e9:,.3g})" for part in PARTS]
        parts.append([row["model"], f"{row['frames']:,}", *each])
    memory = "peak MiB: " + ", ".join(next((list(row["memory"]) for row in rows if row["memory"]), ["resident"]))
    columns = ["model", "frames", "visual tokens", "TFLOPs", "first token, ms", "LLaVA's / this", "prefill, ms"]
    columns += ["tokens/s", "this / LLaVA's", "cache MiB (estimate)", memory, "weights MiB"]
    setting = Setting.of(record)
    notes = (
        f"Geometry {setting}, random weights; {setting.text} text tokens, {cost['answer']} generated, {setting.layers} "
        f"pre-fusion layers{_tiles_note(setting.tiles)}; all models on the same weights, in turns, "
        f"medians of {cost['repeats']} rounds after one that does not count; in brackets the least and the most of a round.",
        "First token: from the pictures to it, all frames alike. Prefill: the language model's part of it, with its head on "
        "the last token alone. TFLOPs: the estimate of the same, attention included. Peak memory: of weights, pictures "
        "and an answer in a process of its own.",
    )
    parts_head = ["model", "frames", *(f"{name}, ms (GFLOPs)" for name in PARTS.values())]
    return "\n".join([*_lines(columns, whole), "", *_lines(parts_head, parts), *(f"\n{note}" for note in notes)]) + "\n"


def _lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)]


def _milliseconds(seconds: Sequence[float]) -> str:
    median, least, most = (1000 * value for value in (statistics.median(seconds), min(seconds), max(seconds)))
    return f"{median:,.1f} ({least:,.1f} to {most:,.1f})"


def _tiles_note(tiles: int) -> str:
    if tiles == 1:
        return ""
    return (
        f"; each frame is {tiles} x {tiles} tiles and the whole of it, which LLaVA takes as {crops_of(tiles)} pictures and "
        "LLaVA-Mini as one, compressed from its tiles"
    )
