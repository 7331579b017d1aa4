"""A record of measured costs as Markdown tables and a figure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.report.style import (
    BLUE,
    CONTROL,
    GREEN,
    GREY,
    LINESTYLES,
    MARKERS,
    ORANGE,
    ORDERED,
    WIDTH,
    save,
    styled,
)

PARTS = {
    "tower": "vision tower",
    "projector": "projector",
    "compressor": "compressor",
    "prefusion": "pre-fusion",
    "prefill": "language model",
    "head": "head",
}
_COLOURS = (GREY, "#bbbbbb", GREEN, ORANGE, BLUE, "#003a70")
MIB, GIB = 2**20, 2**30


def ratios(record: Mapping[str, Any], name: str) -> dict[tuple[str, int], tuple[float, float, float] | None]:
    """How many times as long LLaVA takes for `name`, an entry of `seconds`, by model and frames: the ratio of medians,
    the least and the most of a single round. None where either did not run."""
    llava = {row["frames"]: row["seconds"] for row in record["rows"] if row["model"] == "LLaVA"}
    found: dict[tuple[str, int], tuple[float, float, float] | None] = {}
    for row in record["rows"]:
        ours, theirs = row["seconds"], llava[row["frames"]]
        key = row["model"], row["frames"]
        found[key] = None
        if ours is not None and theirs is not None:
            rounds = [a / b for a, b in zip(theirs[name], ours[name], strict=True)]
            medians = statistics.median(theirs[name]) / statistics.median(ours[name])
            found[key] = medians, min(rounds), max(rounds)
    return found


def peak(row: Mapping[str, Any]) -> int:
    """Bytes on the device where the model is."""
    return row["memory"].get("allocated", row["memory"]["resident"])


def flops(row: Mapping[str, Any]) -> float:
    """Until the first token."""
    return sum(row["flops"][part] for part in PARTS)


def table(record: Mapping[str, Any]) -> str:
    """Markdown: what an answer takes; its parts in time and FLOPs; notes on what is measured."""
    cost, rows = record["cost"], record["rows"]
    first, decode = ratios(record, "first token"), ratios(record, "decode")
    whole, parts = [], []
    for row in rows:
        key = row["model"], row["frames"]
        shown = [row["model"], f"{row['frames']:,}", f"{row['visual_tokens']:,}", _tera(flops(row))]
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
                *(*shown, _milliseconds(times["first token"]), _ratio(first[key]), _milliseconds(prefill)),
                *(f"{rate:,.1f}", _ratio(decode[key]), f"{row['cache_bytes'] / MIB:,.2f} ({estimate})"),
                " / ".join(f"{taken / MIB:,.0f}" for taken in row["memory"].values()),
                f"{row['needs']['weights'] / MIB:,.0f}",
            ]
        )
        each = [f"{1000 * statistics.median(times[part]):,.2f} ({row['flops'][part] / 1e9:,.3g})" for part in PARTS]
        parts.append([row["model"], f"{row['frames']:,}", *each])
    memory = "peak MiB: " + ", ".join(next((list(row["memory"]) for row in rows if row["memory"]), ["resident"]))
    columns = ["model", "frames", "visual tokens", "TFLOPs", "first token, ms", "LLaVA's / this", "prefill, ms"]
    columns += ["tokens/s", "this / LLaVA's", "cache MiB (estimate)", memory, "weights MiB"]
    layers = max(row["prefusion_layers"] for row in rows)
    notes = (
        f"Geometry {cost['geometry']}, random weights, {cost['dtype']}, {record['provenance']['device']}; {cost['text']} "
        f"text tokens, {cost['answer']} generated, {layers} pre-fusion layers; all models on the same weights, in turns, "
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


def _tera(value: float) -> str:
    return f"{value / 1e12:,.3g}"


def _milliseconds(seconds: Sequence[float]) -> str:
    median, least, most = (1000 * value for value in (statistics.median(seconds), min(seconds), max(seconds)))
    return f"{median:,.1f} ({least:,.1f} to {most:,.1f})"


def _ratio(found: tuple[float, float, float] | None) -> str:
    return "" if found is None else "{:.2f} ({:.2f} to {:.2f})".format(*found)


def _short(name: str) -> str:
    return name.removeprefix("LLaVA-Mini, ")


@styled
def draw(record: Mapping[str, Any], stem: Path) -> tuple[Path, Path]:
    """FLOPs and time to the first token of each model by component, for the fewest frames; peak memory against frames."""
    from matplotlib.figure import Figure

    rows, frames = record["rows"], min(record["cost"]["frames"])
    fewest = [row for row in rows if row["frames"] == frames]
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    work, time, memory = figure.subplots(1, 3)
    names = [_short(row["model"]) for row in fewest]
    stacks = (
        (work, [{part: row["flops"][part] / 1e12 for part in PARTS} for row in fewest], "TFLOPs to the first token"),
        (
            time,
            [
                {p: 1000 * statistics.median(row["seconds"][p]) if row["seconds"] else 0.0 for p in PARTS}
                for row in fewest
            ],
            "time to the first token (ms)",
        ),
    )
    for axes, values, label in stacks:
        below = [0.0] * len(fewest)
        for (part, name), colour in zip(PARTS.items(), _COLOURS, strict=True):
            heights = [value[part] for value in values]
            axes.bar(range(len(fewest)), heights, 0.7, bottom=below, color=colour, label=name)
            below = [low + height for low, height in zip(below, heights, strict=True)]
        axes.set_xticks(range(len(fewest)), names, rotation=45, ha="right")
        axes.set_ylabel(label)
    work.set_title(f"{frames:,} frame{'s' * (frames > 1)}")
    for number, name in enumerate(dict.fromkeys(row["model"] for row in rows)):
        ran = [row for row in rows if row["model"] == name and row["memory"]]
        looks = CONTROL if number == 0 else {"color": ORDERED[(number - 1) % len(ORDERED)]}
        looks = {"marker": MARKERS[number % len(MARKERS)], "linestyle": LINESTYLES[number % len(LINESTYLES)]} | looks
        memory.plot([row["frames"] for row in ran], [peak(row) / GIB for row in ran], label=_short(name), **looks)
    memory.set(xscale="log", xlabel="frames", ylabel="peak memory (GiB)")
    memory.set_xticks(record["cost"]["frames"], [f"{count:,}" for count in record["cost"]["frames"]])
    memory.set_xticks([], minor=True)
    low, high = memory.get_ylim()
    memory.set_ylim(low, high + 0.7 * (high - low))  # room for the legend
    memory.legend(loc="upper left", handlelength=2)
    handles, labels = work.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(PARTS))
    return save(figure, stem)
