"""Make the paper's Tables 13 and 14 and its Figs. 7, 8 and 9 from the cost records of a results folder.

python -m experiments.benchmarks.model_cost.paper_tables --results results
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.benchmarks.model_cost.figures import component_bars, memory_curves
from experiments.benchmarks.model_cost.records import (
    CostRecord,
    CostSetting,
    MeasuredModel,
    group_by_setting,
    load_cost_records,
)
from experiments.cost.paper_values import (
    PAPER_ARCHITECTURE,
    PRINTED_FIRST_TOKEN_MS,
    PRINTED_FLOPS,
    PRINTED_MB_PER_FRAME,
    PRINTED_SPEEDUP_672,
    ROUNDING_SLACK,
    TEXT_OF_LLAVA,
    TEXT_OF_MINI,
    recompute_printed_flops,
)
from experiments.files import write_atomically
from experiments.report.figures.style import save
from experiments.report.formatting import NONE
from experiments.report.tables.table import Table
from experiments.report.tables.writers import csv, latex, markdown

MIB, GIB = 2**20, 2**30
WRITERS = {"md": markdown, "tex": latex, "csv": csv}

_FLOPS_TITLES = {
    "tower": "Vision encoder",
    "projector": "Projection",
    "compressor": "Compression",
    "prefusion": "Pre-fusion",
    "language model": "LLM",
    "total": "Total",
}


def first_token_table(measured: Mapping[CostSetting, Sequence[MeasuredModel]]) -> Table:
    """Return the table of times to the first token for one image (Table 13).

    A row holds one setting: LLaVA, then LLaVA-Mini by its number of tokens. The paper's rows follow if one of the
    settings has its architecture.

    Args:
        measured: Measured models by setting.
    """
    one_frame = {
        setting: {row.size: row for row in rows if row.frames == 1}
        for setting, rows in measured.items()
        if any(row.frames == 1 for row in rows)
    }
    with_printed = any(setting.geometry == PAPER_ARCHITECTURE and setting.tiles == 1 for setting in one_frame)
    sizes = sorted(
        {size for rows in one_frame.values() for size in rows}
        | set(PRINTED_FIRST_TOKEN_MS["A100 40G"] if with_printed else ())
    )
    titles = {size: f"{size**2} token{'s' * (size > 1)}" if size else "LLaVA" for size in sizes}
    data, text = [], []
    for setting, rows in one_frame.items():
        labels = _setting_labels(setting)
        text.append(labels | {title: _first_token_text(rows.get(size)) for size, title in titles.items()})
        for size, row in rows.items():
            values = (row.ratio.median, row.ratio.least, row.ratio.most) if row.ratio else (None, None, None)
            values = (row.seconds and 1000 * row.seconds["first token"], *values)
            entries: dict[str, Any] = {"tokens": size**2 or None}
            entries |= dict(zip(("milliseconds", "ratio", "ratio_low", "ratio_high"), values, strict=True))
            setup = {"text": setting.text, "layers": setting.layers}
            data.append({**_lower_keys(labels), **setup, **entries, "source": "measured"})
    for device, printed in PRINTED_FIRST_TOKEN_MS.items() if with_printed else ():
        labels = {"Geometry": PAPER_ARCHITECTURE, "Pixels": "336", "Device": f"{device}, printed", "Numbers": NONE}
        cells = {size: f"{printed[size]:.1f} ({printed[0] / printed[size]:.2f}x)" for size in printed if size}
        cells[0] = f"{printed[0]:.1f}"
        text.append(labels | {title: cells.get(size, NONE) for size, title in titles.items()})
        for size, milliseconds in printed.items():
            entries = {"tokens": size**2 or None, "milliseconds": milliseconds, "ratio": printed[0] / milliseconds}
            data.append({**_lower_keys(labels | {"Numbers": "", "Device": device}), **entries, "source": "printed"})
    notes = [
        "Milliseconds from an image to the first token, random weights, medians; in brackets LLaVA's time over that of the "
        "model, from runs in turns. LLaVA takes an image in tiles as several images, the whole image among them.",
        *(f"{setting}: {setting.text} text tokens, {setting.layers} pre-fusion layers." for setting in one_frame),
    ]
    if with_printed:
        notes.append(
            "Printed: the paper's Table 13, on other devices than ours; the paper does not state its weights and text."
        )
    if any(setting.tiles == 2 and setting.geometry == PAPER_ARCHITECTURE for setting in one_frame):
        notes.append(f"For 672 pixels the paper prints {PRINTED_SPEEDUP_672}x (Fig. 8), without the number of tokens.")
    columns = ["Geometry", "Pixels", "Device", "Numbers", *titles.values()]
    caption = "Time to the first token of one image (the paper's Table 13)."
    numeric = ("Pixels", *titles.values())
    return Table("table13", caption, pd.DataFrame(data), pd.DataFrame(text, columns=columns), numeric, tuple(notes))


def flops_table() -> Table:
    """Return the table of teraFLOPs by component (Table 14): recomputed as the paper counts, then printed.

    It needs no record.
    """
    table14 = [printed for printed in PRINTED_FLOPS if printed.source.startswith("Table 14")]
    data, text, notes = [], [], []
    for tiles, is_mini in dict.fromkeys((printed.tiles, printed.size > 0) for printed in table14):
        labels = {"Pixels": str(336 * tiles), "Model": "LLaVA-Mini, 1 token" if is_mini else "LLaVA"}
        cells = dict.fromkeys(_FLOPS_TITLES.values(), NONE)
        for printed in table14:
            if (printed.tiles, printed.size > 0) == (tiles, is_mini):
                value, title = recompute_printed_flops(printed), _FLOPS_TITLES[printed.part]
                fits = abs(value - printed.value) <= 0.5 * 10**-printed.digits * (1 + ROUNDING_SLACK)
                recomputed = f"{value:.{max(printed.digits, 3)}f}"
                cells[title] = f"{recomputed} ({printed.value:.{printed.digits}f}){'' if fits else '*'}"
                entries = {"part": title, "ours": value, "printed": printed.value, "fits": fits, "note": printed.note}
                data.append({**_lower_keys(labels), **entries})
                if printed.note:
                    notes.append(f"{printed.source.removeprefix('Table 14, ')}: {printed.note}.")
        text.append(labels | cells)
    explanations = (
        "Counted from the configuration of LLaVA-1.5-7B as the paper counts: linear maps only, the head on every token, "
        f"{TEXT_OF_LLAVA} text tokens for LLaVA and {TEXT_OF_MINI} for LLaVA-Mini. In brackets: printed. *: different "
        "after rounding.",
        "The paper counts most of pre-fusion under LLM.",
    )
    caption = "TeraFLOPs by component (the paper's Table 14)."
    numeric = ("Pixels", *_FLOPS_TITLES.values())
    return Table("table14", caption, pd.DataFrame(data), pd.DataFrame(text), numeric, (*explanations, *notes))


def memory_table(measured: Mapping[CostSetting, Sequence[MeasuredModel]]) -> Table:
    """Return Fig. 9 as a table: peak memory over the smallest and the largest number of frames, and memory per frame.

    Args:
        measured: Measured models by setting. Models that ran over one number of frames only are left out.
    """
    data, text = [], []
    for setting, rows in measured.items():
        for size in dict.fromkeys(row.size for row in rows):
            with_peak = [row for row in rows if row.size == size and row.peak]
            if len(with_peak) < 2:
                continue
            first, last = with_peak[0], with_peak[-1]
            more_frames = last.frames - first.frames
            peak, cache = (
                (last.peak - first.peak) / more_frames,  # type: ignore[operator]
                (last.row["cache_bytes"] - first.row["cache_bytes"]) / more_frames,
            )
            is_papers = setting.geometry == PAPER_ARCHITECTURE and setting.tiles == 1
            printed = PRINTED_MB_PER_FRAME.get(size) if is_papers else None
            labels = _setting_labels(setting) | {"Model": first.name}
            span = {"first_frames": first.frames, "last_frames": last.frames, "first_peak": first.peak}
            data.append(
                {**_lower_keys(labels), **span, "last_peak": last.peak, "of_frame": peak, "cache_of_frame": cache}
                | {"printed_mb": printed}
            )
            text.append(
                {
                    **labels,
                    "Frames": f"{first.frames:,} to {last.frames:,}",
                    "Peak (MiB)": f"{(first.peak or 0) / MIB:,.0f} to {(last.peak or 0) / MIB:,.0f}",
                    "Per frame (MiB)": f"{peak / MIB:,.2f}",
                    "Cache per frame (MiB)": f"{cache / MIB:,.2f}",
                    "Printed (MB)": NONE if printed is None else f"{printed:g}",
                }
            )
    columns = ["Geometry", "Pixels", "Device", "Numbers", "Model", "Frames", "Peak (MiB)", "Per frame (MiB)"]
    columns += ["Cache per frame (MiB)", "Printed (MB)"]
    notes = (
        "Peak memory of weights, images and an answer in a separate process, on the model's device. LLaVA-Mini takes "
        "frames in chunks from a stream: until a chunk is full, each frame needs more than its cache.",
    )
    return Table(
        "memory",
        "Peak memory against frames (the paper's Fig. 9).",
        pd.DataFrame(data),
        pd.DataFrame(text, columns=columns),
        ("Pixels", *columns[5:]),
        notes,
    )


def write_paper_tables(records: Sequence[CostRecord], out: Path) -> tuple[list[Path], list[str]]:
    """Write all tables, and the figures that have records.

    Args:
        records: The records.
        out: The folder to write into.

    Returns:
        The paths that were written, and a line for each figure that has no records.
    """
    measured = group_by_setting(records)
    out.mkdir(parents=True, exist_ok=True)
    written, missing = [], []
    for table in (first_token_table(measured), flops_table(), memory_table(measured)):
        for suffix, write in WRITERS.items():
            path = out / f"{table.name}.{suffix}"
            write_atomically(path, write(table))
            written.append(path)
    whole = {setting: rows for setting, rows in measured.items() if setting.tiles == 1}
    tiled = {setting: rows for setting, rows in measured.items() if setting.tiles > 1}
    videos = {setting: rows for setting, rows in measured.items() if len({row.frames for row in rows if row.peak}) > 1}
    for stem, settings, draw, override in (
        ("figure7", whole, component_bars, "cost.tiles=1"),
        ("figure8", tiled, component_bars, "cost.tiles=2"),
        ("figure9", videos, memory_curves, "cost.frames=[1,10,100]"),
    ):
        for suffix in (".png", ".pdf"):
            # An earlier report may have drawn it from records that are gone.
            (out / stem).with_suffix(suffix).unlink(missing_ok=True)
        if settings:
            written += save(draw(settings), out / stem)
        else:
            missing.append(
                f"{stem} not drawn: no record has {override}; run `python -m experiments.run experiment=cost {override}`"
            )
    return written, missing


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables and figures, and print the tables and all paths.

    Returns:
        The exit status: 1 if there is no record or the folder cannot be written, else 0.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.model_cost.paper_tables", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder that holds cost/ (%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for tables and figures (default: RESULTS/cost/report)"
    )
    arguments = parser.parse_args(argv)
    folder = arguments.results / "cost"
    out = arguments.out or folder / "report"
    try:
        records, errors = load_cost_records(folder)
        for error in errors:
            print(f"warning: left out {error}", file=sys.stderr)
        written, missing = write_paper_tables(records, out)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(path.read_text(encoding="utf-8") for path in written if path.suffix == ".md"))
    print("\n".join([*map(str, written), *missing]))
    return 0


def _setting_labels(setting: CostSetting) -> dict[str, str]:
    """Return the first cells of a row."""
    return {
        "Geometry": setting.geometry,
        "Pixels": str(setting.pixels),
        "Device": setting.machine,
        "Numbers": setting.dtype,
    }


def _lower_keys(labels: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in labels.items()}


def _first_token_text(row: MeasuredModel | None) -> str:
    """Return the cell of a model: its time and LLaVA's time over it, or the memory that it needs."""
    if row is None:
        return NONE
    if row.seconds is None:
        return f"needs {row.row['needs']['total'] / GIB:,.3g} GiB"
    milliseconds = f"{1000 * row.seconds['first token']:,.1f}"
    return f"{milliseconds} ({row.ratio.median:.2f}x)" if row.ratio and row.size else milliseconds


if __name__ == "__main__":
    sys.exit(main())
