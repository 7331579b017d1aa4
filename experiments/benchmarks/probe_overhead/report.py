"""Markdown table and figure of a record of the recording benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.markdown import markdown_table
from experiments.report.figures.style import BLUE, GREEN, GREY, ORANGE, ORDERED, WIDTH, save, styled

MODE_LABELS = {
    "plain": "plain forward, sdpa",
    "text": "record_attention, text targets",
    "all": "record_attention, all targets",
    "mass": "record_attention, all targets, mass alone",
    "contribution": "record_attention, all targets, contribution",
    "output_attentions": "eager, output_attentions",
    "hooks": "eager, forward hooks",
    "nnsight": "nnsight (eager)",
    "bridge": "TransformerBridge (eager)",
}
MIB = 2**20
LIGHT_BLUE, DARK_BLUE = ORDERED[0], ORDERED[3]
_MODE_COLOURS = {
    "text": BLUE,
    "all": GREEN,
    "mass": LIGHT_BLUE,
    "contribution": DARK_BLUE,
    "output_attentions": GREY,
    "hooks": GREY,
    "nnsight": ORANGE,
    "bridge": ORANGE,
}


def overhead_ratios(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Compare each row of a record with the plain pass of the same model and size.

    Returns:
        The rows with new entries: `time`, the ratio of median seconds; `low` and `high`, the lowest and the highest ratio
        of a single round; `ratio`, that of memory; and `extra`, the additional memory in MiB. They are None where a mode
        did not run.
    """
    plain = {(row["model"], row["visual"]): row for row in record["rows"] if row["mode"] == "plain"}
    rows = []
    for row in record["rows"]:
        base = plain[row["model"], row["visual"]]
        new = dict(row) | {"time": None, "low": None, "high": None, "ratio": None, "extra": None}
        if row["seconds"]:
            rounds = [a / b for a, b in zip(row["seconds"], base["seconds"], strict=True)]
            new["time"] = statistics.median(row["seconds"]) / statistics.median(base["seconds"])
            new |= {"low": min(rounds), "high": max(rounds)}
            new |= {"ratio": row["memory"] / base["memory"], "extra": (row["memory"] - base["memory"]) / MIB}
        rows.append(new)
    return rows


def overhead_markdown(record: Mapping[str, Any]) -> str:
    """Return a Markdown table with a row for each mode at each size, and notes on what was measured."""
    bench, rows = record["bench"], []
    for row in overhead_ratios(record):
        cells = [row["model"], f"{row['visual']:,}+{row['text']}", MODE_LABELS[row["mode"]]]
        if row["seconds"]:
            error = "" if row["error"] is None else f"{row['error']:.0e}"
            cells += [f"{row['time']:.2f} ({row['low']:.2f} to {row['high']:.2f})", f"{row['ratio']:.2f}"]
            cells += [f"{row['extra']:+,.0f}", error]
        else:
            cells += [f"not run: {row['matrices_gib']:,.0f} GiB of matrices", "", "", ""]
        rows.append(cells)
    shapes = "; ".join(
        f"{m['name']}: {m['heads']} heads of {m['head_width']}, MLP {m['mlp']}, {m['layers']} of {m['of_layers']} layers"
        for m in bench["models"]
    )
    notes = (
        f"Llama shapes ({shapes}), {bench['dtype']}, {record['provenance']['device']}, medians of {bench['repeats']} "
        "rounds in which the modes take turns; in brackets the lowest and the highest single round.",
        "A plain pass is the forward pass of the language model with its head on all positions; the vocabulary of "
        f"{bench['vocabulary']:,} is cut in proportion to the layers. There is no vision tower; with one, the ratios are "
        "closer to 1.",
        "Memory is the peak of weights, activations and the data of the mode, in a separate process, over that of the "
        "plain pass; MiB: the difference. Difference: the largest one in the mean mass of instruction queries on a group, "
        "compared with text targets.",
    )
    columns = ["model", "visual+text", "mode", "time", "memory", "MiB", "difference"]
    right_aligned = ("visual+text", "time", "memory", "MiB", "difference")
    return "\n".join([markdown_table(columns, rows, right_aligned), *(f"\n{note}" for note in notes)]) + "\n"


@styled
def draw_overhead(record: Mapping[str, Any], stem: Path) -> tuple[Path, Path]:
    """Draw bars of time over a plain pass, with a panel for each model and a group for each size.

    Args:
        record: A record of the benchmark.
        stem: The path of the figure without suffix.
    """
    from matplotlib.figure import Figure

    rows, models = overhead_ratios(record), [model["name"] for model in record["bench"]["models"]]
    modes = [mode for mode in record["bench"]["modes"] if mode != "plain"]
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        sizes = sorted({row["visual"] for row in rows})
        for index, mode in enumerate(modes):
            mode_rows = {row["visual"]: row for row in rows if (row["model"], row["mode"]) == (model, mode)}
            timed = [(x, mode_rows[size]) for x, size in enumerate(sizes) if mode_rows[size]["time"] is not None]
            x = [x + (index - (len(modes) - 1) / 2) * 0.8 / len(modes) for x, _ in timed]
            spread = [[row["time"] - row["low"] for _, row in timed], [row["high"] - row["time"] for _, row in timed]]
            axes.bar(
                x,
                [row["time"] for _, row in timed],
                0.8 / len(modes),
                yerr=[[max(value, 0.0) for value in side] for side in spread],
                color=_MODE_COLOURS[mode],
                alpha=1.0 if mode in ("text", "mass", "contribution", "output_attentions", "nnsight") else 0.6,
                label=MODE_LABELS[mode],
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
