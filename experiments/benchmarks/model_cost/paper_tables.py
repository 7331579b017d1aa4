"""The paper's Tables 13 and 14 and its Figs. 7, 8 and 9, from whatever records of measured costs a folder holds.

python -m experiments.benchmarks.model_cost.paper_tables --results results
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.benchmarks.model_cost.figures import bars, memory
from experiments.benchmarks.model_cost.records import Measured, Record, Setting, load, measured
from experiments.cost.paper_values import (
    FIRST_TOKEN,
    GEOMETRY,
    MEMORY_OF_A_FRAME,
    PRINTED,
    SLACK,
    SPEED_UP_672,
    TEXT_OF_LLAVA,
    TEXT_OF_MINI,
    ours,
)
from experiments.files import write_atomically
from experiments.report.figures.style import save
from experiments.report.formatting import NONE
from experiments.report.tables.table import Table
from experiments.report.tables.writers import csv, latex, markdown

MIB, GIB = 2**20, 2**30
WRITERS = {"md": markdown, "tex": latex, "csv": csv}


def table13(found: Mapping[Setting, Sequence[Measured]]) -> Table:
    """Time to the first token of one picture, a row for each setting, LLaVA and then LLaVA-Mini by its tokens; below the
    paper's own where one of the settings is its geometry."""
    single = {
        setting: {row.size: row for row in rows if row.frames == 1}
        for setting, rows in found.items()
        if any(row.frames == 1 for row in rows)
    }
    of_paper = any(setting.geometry == GEOMETRY and setting.tiles == 1 for setting in single)
    sizes = sorted(
        {size for rows in single.values() for size in rows} | set(FIRST_TOKEN["A100 40G"] if of_paper else ())
    )
    titles = {size: f"{size**2} token{'s' * (size > 1)}" if size else "LLaVA" for size in sizes}
    data, text = [], []
    for setting, rows in single.items():
        named = {"Geometry": setting.geometry, "Pixels": str(setting.pixels), "Device": setting.machine}
        named |= {"Numbers": setting.dtype}
        text.append(named | {title: _latency(rows.get(size)) for size, title in titles.items()})
        for size, row in rows.items():
            times = (row.ratio.median, row.ratio.least, row.ratio.most) if row.ratio else (None, None, None)
            times = (row.seconds and 1000 * row.seconds["first token"], *times)
            shown: dict[str, Any] = {"tokens": size**2 or None}
            shown |= dict(zip(("milliseconds", "ratio", "ratio_low", "ratio_high"), times, strict=True))
            setup = {"text": setting.text, "layers": setting.layers}
            data.append({**_lowered(named), **setup, **shown, "source": "measured"})
    for device, printed in FIRST_TOKEN.items() if of_paper else ():
        named = {"Geometry": GEOMETRY, "Pixels": "336", "Device": f"{device}, printed", "Numbers": NONE}
        cells = {size: f"{printed[size]:.1f} ({printed[0] / printed[size]:.2f}x)" for size in printed if size}
        cells[0] = f"{printed[0]:.1f}"
        text.append(named | {title: cells.get(size, NONE) for size, title in titles.items()})
        for size, milliseconds in printed.items():
            shown = {"tokens": size**2 or None, "milliseconds": milliseconds, "ratio": printed[0] / milliseconds}
            data.append({**_lowered(named | {"Numbers": "", "Device": device}), **shown, "source": "printed"})
    notes = [
        "Milliseconds from a picture to the first token, random weights, medians; in brackets LLaVA's over this one's, of "
        "runs in turns. LLaVA takes a picture in tiles as so many pictures, the whole one too.",
        *(f"{setting}: {setting.text} text tokens, {setting.layers} pre-fusion layers." for setting in single),
    ]
    if of_paper:
        notes.append(
            "Printed: the paper's Table 13, on other devices than ours, with weights and a text that it does not name."
        )
    if any(setting.tiles == 2 and setting.geometry == GEOMETRY for setting in single):
        notes.append(f"Of 672 pixels the paper says {SPEED_UP_672}x (Fig. 8), without the number of tokens.")
    columns = ["Geometry", "Pixels", "Device", "Numbers", *titles.values()]
    caption = "Time to the first token of one picture (the paper's Table 13)."
    numeric = ("Pixels", *titles.values())
    return Table("table13", caption, pd.DataFrame(data), pd.DataFrame(text, columns=columns), numeric, tuple(notes))


def _lowered(named: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in named.items()}


def _latency(row: Measured | None) -> str:
    if row is None:
        return NONE
    if row.seconds is None:
        return f"needs {row.row['needs']['total'] / GIB:,.3g} GiB"
    shown = f"{1000 * row.seconds['first token']:,.1f}"
    return f"{shown} ({row.ratio.median:.2f}x)" if row.ratio and row.size else shown


_TABLE_14 = {
    "tower": "Vision encoder",
    "projector": "Projection",
    "compressor": "Compression",
    "prefusion": "Pre-fusion",
    "language model": "LLM",
    "total": "Total",
}


def table14() -> Table:
    """TeraFLOPs by component as the paper counts them, ours and then what it prints; needs no record."""
    printed = [p for p in PRINTED if p.source.startswith("Table 14")]
    data, text, notes = [], [], []
    for tiles, mini in dict.fromkeys((p.tiles, p.size > 0) for p in printed):
        named = {"Pixels": str(336 * tiles), "Model": "LLaVA-Mini, 1 token" if mini else "LLaVA"}
        cells = dict.fromkeys(_TABLE_14.values(), NONE)
        for each in printed:
            if (each.tiles, each.size > 0) == (tiles, mini):
                value, title = ours(each), _TABLE_14[each.part]
                fits = abs(value - each.value) <= 0.5 * 10**-each.digits * (1 + SLACK)
                cells[title] = f"{value:.{max(each.digits, 3)}f} ({each.value:.{each.digits}f}){'' if fits else '*'}"
                shown = {"part": title, "ours": value, "printed": each.value, "fits": fits, "note": each.note}
                data.append({**_lowered(named), **shown})
                if each.note:
                    notes.append(f"{each.source.removeprefix('Table 14, ')}: {each.note}.")
        text.append(named | cells)
    explained = (
        "Counted from the configuration of LLaVA-1.5-7B as the paper counts: linear maps alone, the head on every token, "
        f"{TEXT_OF_LLAVA} text tokens for LLaVA and {TEXT_OF_MINI} for LLaVA-Mini. In brackets: printed. *: not the same "
        "after rounding.",
        "What the paper books under LLM holds most of pre-fusion.",
    )
    caption = "TeraFLOPs by component (the paper's Table 14)."
    numeric = ("Pixels", *_TABLE_14.values())
    return Table("table14", caption, pd.DataFrame(data), pd.DataFrame(text), numeric, (*explained, *notes))


def memory_table(found: Mapping[Setting, Sequence[Measured]]) -> Table:
    """Fig. 9 in numbers: peak memory over the fewest and the most frames that ran, and what a frame adds."""
    data, text = [], []
    for setting, rows in found.items():
        for size in dict.fromkeys(row.size for row in rows):
            ran = [row for row in rows if row.size == size and row.peak]
            if len(ran) < 2:
                continue
            first, last = ran[0], ran[-1]
            more = last.frames - first.frames
            peak, cache = (
                (last.peak - first.peak) / more,  # type: ignore[operator]
                (last.row["cache_bytes"] - first.row["cache_bytes"]) / more,
            )
            printed = MEMORY_OF_A_FRAME.get(size) if setting.geometry == GEOMETRY and setting.tiles == 1 else None
            named = {"Geometry": setting.geometry, "Pixels": str(setting.pixels), "Device": setting.machine}
            named |= {"Numbers": setting.dtype, "Model": first.name}
            span = {"first_frames": first.frames, "last_frames": last.frames, "first_peak": first.peak}
            data.append(
                {**_lowered(named), **span, "last_peak": last.peak, "of_frame": peak, "cache_of_frame": cache}
                | {"printed_mb": printed}
            )
            text.append(
                {
                    **named,
                    "Frames": f"{first.frames:,} to {last.frames:,}",
                    "Peak (MiB)": f"{(first.peak or 0) / MIB:,.0f} to {(last.peak or 0) / MIB:,.0f}",
                    "A frame adds (MiB)": f"{peak / MIB:,.2f}",
                    "Of it cache (MiB)": f"{cache / MIB:,.2f}",
                    "Printed (MB)": NONE if printed is None else f"{printed:g}",
                }
            )
    columns = ["Geometry", "Pixels", "Device", "Numbers", "Model", "Frames", "Peak (MiB)", "A frame adds (MiB)"]
    columns += ["Of it cache (MiB)", "Printed (MB)"]
    notes = (
        "Peak memory of weights, pictures and an answer in a process of its own, on the device where the model is. "
        "LLaVA-Mini takes frames in chunks from a stream: until a chunk is full, more frames take more beside the cache.",
    )
    return Table(
        "memory",
        "Peak memory against frames (the paper's Fig. 9).",
        pd.DataFrame(data),
        pd.DataFrame(text, columns=columns),
        ("Pixels", *columns[5:]),
        notes,
    )


def write(records: Sequence[Record], out: Path) -> tuple[list[Path], list[str]]:
    """Tables and figures of all records into `out`: what was written, and a line for each figure that has no records."""
    found = measured(records)
    out.mkdir(parents=True, exist_ok=True)
    written, holes = [], []
    for table in (table13(found), table14(), memory_table(found)):
        for suffix, format_ in WRITERS.items():
            path = out / f"{table.name}.{suffix}"
            write_atomically(path, format_(table))
            written.append(path)
    whole = {setting: rows for setting, rows in found.items() if setting.tiles == 1}
    tiled = {setting: rows for setting, rows in found.items() if setting.tiles > 1}
    videos = {setting: rows for setting, rows in found.items() if len({row.frames for row in rows if row.peak}) > 1}
    for stem, drawn, draw, wanted in (
        ("figure7", whole, bars, "cost.tiles=1"),
        ("figure8", tiled, bars, "cost.tiles=2"),
        ("figure9", videos, memory, "cost.frames=[1,10,100]"),
    ):
        for suffix in (".png", ".pdf"):
            (out / stem).with_suffix(suffix).unlink(missing_ok=True)  # of an earlier report that had the records
        if drawn:
            written += save(draw(drawn), out / stem)
        else:
            holes.append(
                f"{stem} not drawn: no record has {wanted}; `python -m experiments.run experiment=cost {wanted}`"
            )
    return written, holes


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if there is no record or the folder cannot be written, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.model_cost.paper_tables", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder that holds cost/ (%(default)s)")
    parser.add_argument("--out", type=Path, default=None, help="where tables and figures go (RESULTS/cost/report)")
    arguments = parser.parse_args(argv)
    folder = arguments.results / "cost"
    out = arguments.out or folder / "report"
    try:
        records, wrong = load(folder)
        for line in wrong:
            print(f"warning: left out {line}", file=sys.stderr)
        written, holes = write(records, out)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(path.read_text(encoding="utf-8") for path in written if path.suffix == ".md"))
    print("\n".join([*map(str, written), *holes]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
