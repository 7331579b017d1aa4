"""A benchmark's record as a Markdown table and a figure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.report.figures.style import BLUE, GREEN, GREY, ORANGE, WIDTH, save, styled

NAMES = {
    "plain": "plain forward, sdpa",
    "text": "record_attention, text targets",
    "all": "record_attention, all targets",
    "output_attentions": "eager, output_attentions",
    "hooks": "eager, forward hooks",
    "nnsight": "nnsight (eager)",
    "bridge": "TransformerBridge (eager)",
}
_COLOURS = {"text": BLUE, "all": GREEN, "output_attentions": GREY, "hooks": GREY, "nnsight": ORANGE, "bridge": ORANGE}
MIB = 2**20


def ratios(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each row beside the plain pass of its size: `time` (ratio of medians), `low` and `high` (of single rounds),
    `memory` (ratio), `extra` (MiB). None where a mode did not run."""
    plain = {(row["model"], row["visual"]): row for row in record["rows"] if row["mode"] == "plain"}
    found = []
    for row in record["rows"]:
        base = plain[row["model"], row["visual"]]
        new = dict(row) | {"time": None, "low": None, "high": None, "ratio": None, "extra": None}
        if row["seconds"]:
            rounds = [a / b for a, b in zip(row["seconds"], base["seconds"], strict=True)]
            new["time"] = statistics.median(row["seconds"]) / statistics.median(base["seconds"])
            new |= {"low": min(rounds), "high": max(rounds)}
            new |= {"ratio": row["memory"] / base["memory"], "extra": (row["memory"] - base["memory"]) / MIB}
        found.append(new)
    return found


def table(record: Mapping[str, Any]) -> str:
    """Markdown: one line for each mode at each size, with notes on what is measured."""
    bench, lines = record["bench"], []
    for row in ratios(record):
        cells = [row["model"], f"{row['visual']:,}+{row['text']}", NAMES[row["mode"]]]
        if row["seconds"]:
            error = "" if row["error"] is None else f"{row['error']:.0e}"
            cells += [f"{row['time']:.2f} ({row['low']:.2f} to {row['high']:.2f})", f"{row['ratio']:.2f}"]
            cells += [f"{row['extra']:+,.0f}", error]
        else:
            cells += [f"not run: {row['matrices_gib']:,.0f} GiB of matrices", "", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    shapes = "; ".join(
        f"{m['name']}: {m['heads']} heads of {m['head_width']}, MLP {m['mlp']}, {m['layers']} of {m['of_layers']} layers"
        for m in bench["models"]
    )
    notes = (
        f"Llama shapes ({shapes}), {bench['dtype']}, {record['provenance']['device']}, medians of {bench['repeats']} "
        "rounds in which the modes take turns; in brackets the least and the most of a single round.",
        f"A plain pass is the language model's forward with its head on all positions; the vocabulary of "
        f"{bench['vocabulary']:,} is cut as the layers are. There is no vision tower: with one, ratios are closer to 1.",
        "Memory is the peak of weights, activations and what the mode adds, in a process of its own, over that of the "
        "plain pass; MiB: the difference. Difference: the greatest of the mean mass of instruction queries on a group, "
        "from text targets.",
    )
    head = ["model", "visual+text", "mode", "time", "memory", "MiB", "difference"]
    rule = ["---", "---:", "---", "---:", "---:", "---:", "---:"]
    return (
        "\n".join([*(f"| {' | '.join(cells)} |" for cells in (head, rule)), *lines, *(f"\n{n}" for n in notes)]) + "\n"
    )


@styled
def draw(record: Mapping[str, Any], stem: Path) -> tuple[Path, Path]:
    """Bars of time over a plain pass, one panel for each model, one group for each size."""
    from matplotlib.figure import Figure

    rows, models = ratios(record), [model["name"] for model in record["bench"]["models"]]
    names = [mode for mode in record["bench"]["modes"] if mode != "plain"]
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        sizes = sorted({row["visual"] for row in rows})
        for place, mode in enumerate(names):
            of_mode = {row["visual"]: row for row in rows if (row["model"], row["mode"]) == (model, mode)}
            ran = [(x, of_mode[size]) for x, size in enumerate(sizes) if of_mode[size]["time"] is not None]
            x = [x + (place - (len(names) - 1) / 2) * 0.8 / len(names) for x, _ in ran]
            spread = [[row["time"] - row["low"] for _, row in ran], [row["high"] - row["time"] for _, row in ran]]
            axes.bar(
                x,
                [row["time"] for _, row in ran],
                0.8 / len(names),
                yerr=[[max(value, 0.0) for value in side] for side in spread],
                color=_COLOURS[mode],
                alpha=1.0 if mode in ("text", "output_attentions", "nnsight") else 0.6,
                label=NAMES[mode],
                error_kw={"linewidth": 0.7},
            )
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_yscale("log", base=2)
        axes.set_xticks(range(len(sizes)), [f"{size:,}+{record['bench']['text']}" for size in sizes])
        axes.set(title=model, xlabel="visual + text tokens")
    panels[0].set_ylabel("time over a plain forward pass")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return save(figure, stem)
