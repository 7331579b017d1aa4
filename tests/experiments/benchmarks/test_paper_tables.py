"""Test the paper's tables and figures on cost_record-up cost records with known numbers."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.benchmarks.model_cost import paper_tables
from experiments.benchmarks.model_cost.figures import component_bars, memory_curves
from experiments.benchmarks.model_cost.records import (
    COMPONENTS,
    CostSetting,
    MeasuredModel,
    TimeRatio,
    group_by_setting,
    load_cost_records,
    read_cost_record,
)
from experiments.cost.paper_values import PAPER_ARCHITECTURE, PRINTED_FIRST_TOKEN_MS

# Seconds of a component in each of two rounds, by C; 0 is LLaVA.
SECONDS = {0: [4.0, 8.0], 1: [1.0, 4.0], 2: [2.0, 2.0]}


def cost_record(geometry: str = "smol", tiles: int = 1, started: str = "2026-01-01", **changes: Any) -> dict[str, Any]:
    """Return a record of LLaVA and of LLaVA-Mini with 1 and 4 tokens, over 1 and 11 frames.

    LLaVA did not run over 11 frames.
    """
    rows = []
    for frames in changes.get("frames", [1, 11]):
        for size, rounds in SECONDS.items():
            did_run = size > 0 or frames == 1
            times = dict.fromkeys(COMPONENTS, rounds) | {
                "first token": [7 * spent for spent in rounds],
                "decode": [1.0, 1.0],
            }
            rows.append(
                {
                    "model": f"LLaVA-Mini, {size**2} token{'s' * (size > 1)}" if size else "LLaVA",
                    "size": size,
                    "frames": frames,
                    "visual_tokens": frames * (size**2 or 256),
                    "prefusion_layers": 4 * (size > 0),
                    "flops": dict.fromkeys((*COMPONENTS, "decode"), (10 - size) * 1e12),
                    "seconds": times if did_run else None,
                    "memory": {"resident": 2**20 * (100 + size + 3 * frames)} if did_run else None,
                    "cache_bytes": 2**20 * 2 * frames if did_run else None,
                    "cache_estimate": 2**20 * 2 * frames,
                    "needs": {"total": 5 * 2**30, "weights": 2**20},
                }
            )
    return {
        "cost": {"geometry": geometry, "dtype": "bfloat16", "tiles": tiles, "text": 60},
        "pixels": 336 * tiles,
        "machine": changes.get("machine", "a device"),
        "rows": rows,
        "provenance": {"started": started},
    }


def write_records(folder: Path, *records: dict[str, Any]) -> Path:
    """Write the records into a results folder, and return the folder."""
    (folder / "cost").mkdir(parents=True, exist_ok=True)
    for number, record in enumerate(records):
        (folder / "cost" / f"{number}.json").write_text(json.dumps(record))
    return folder


def test_first_token_table_has_row_for_each_setting() -> None:
    records = [cost_record(), cost_record(machine="another"), cost_record(tiles=2)]
    table = paper_tables.first_token_table(group_by_setting(records))
    assert list(table.text.columns) == ["Geometry", "Pixels", "Device", "Numbers", "LLaVA", "1 token", "4 tokens"]
    assert [list(row) for row in table.text.itertuples(index=False)] == [
        ["smol", "336", "a device", "bfloat16", "42,000.0", "17,500.0 (2.40x)", "14,000.0 (3.00x)"],
        ["smol", "336", "another", "bfloat16", "42,000.0", "17,500.0 (2.40x)", "14,000.0 (3.00x)"],
        ["smol", "672", "a device", "bfloat16", "42,000.0", "17,500.0 (2.40x)", "14,000.0 (3.00x)"],
    ]
    one = table.data[(table.data.device == "another") & (table.data.tokens == 1)].iloc[0]
    assert (one.ratio, one.ratio_low, one.ratio_high, one.milliseconds) == (2.4, 2.0, 4.0, 17500)


def test_first_token_table_shows_printed_rows_for_papers_architecture_only() -> None:
    assert not any(
        "printed" in device for device in paper_tables.first_token_table(group_by_setting([cost_record()])).text.Device
    )
    assert not any(
        "printed" in device
        for device in paper_tables.first_token_table(
            group_by_setting([cost_record(PAPER_ARCHITECTURE, tiles=2)])
        ).text.Device
    )
    table = paper_tables.first_token_table(group_by_setting([cost_record(PAPER_ARCHITECTURE)]))
    assert list(table.text.Device[1:]) == [f"{device}, printed" for device in PRINTED_FIRST_TOKEN_MS]
    row = table.text.iloc[2]
    assert list(row[["LLaVA", "1 token", "16 tokens"]]) == ["113.0", "38.6 (2.93x)", "39.3 (2.88x)"]
    assert table.text.iloc[0]["16 tokens"] == paper_tables.NONE, "not measured"


def test_first_token_table_model_without_memory_shows_its_needs() -> None:
    record = cost_record()
    record["rows"][0]["seconds"] = None
    row = paper_tables.first_token_table(group_by_setting([record])).text.iloc[0]
    assert list(row[["LLaVA", "1 token"]]) == ["needs 5 GiB", "17,500.0"]


def test_flops_table_marks_figures_that_differ() -> None:
    table = paper_tables.flops_table()
    cells = table.text.set_index(["Pixels", "Model"])
    assert cells.loc[("336", "LLaVA"), "Total"] == "8.551 (8.55)"
    assert cells.loc[("336", "LLaVA"), "Pre-fusion"] == paper_tables.NONE
    assert cells.loc[("336", "LLaVA-Mini, 1 token"), "Pre-fusion"] == "1.004 (0.125)*"
    assert cells.loc[("672", "LLaVA-Mini, 1 token"), "LLM"] == "0.583 (4.131)*"
    for _, row in table.data.groupby(["pixels", "model"]):
        parts = row.set_index("part")
        assert parts.ours.drop("Total").sum() == pytest.approx(parts.ours["Total"], abs=1e-9)
    assert (~table.data.fits).sum() == 8
    assert sum("*" in str(cell) for cell in table.text.to_numpy().flat) == 8


def test_memory_table_reports_memory_per_frame() -> None:
    table = paper_tables.memory_table(group_by_setting([cost_record(PAPER_ARCHITECTURE)]))
    assert list(table.text.Model) == ["1 token", "4 tokens"], "LLaVA ran over one number of frames"
    assert list(table.data.of_frame / 2**20) == [3, 3]
    assert list(table.data.cache_of_frame / 2**20) == [2, 2]
    assert list(table.text["Printed (MB)"]) == ["0.6", paper_tables.NONE]
    assert list(table.text["Peak (MiB)"]) == ["104 to 134", "105 to 135"]


def test_group_by_setting_of_two_measurements_newer_counts() -> None:
    old, new = cost_record(started="2026-01-01", frames=[1]), cost_record(started="2026-02-01", frames=[1])
    new["rows"] = [row for row in new["rows"] if row["size"] < 2]
    for row in new["rows"]:
        row["seconds"] = {name: [2 * spent for spent in rounds] for name, rounds in row["seconds"].items()}
    for records in ([old, new], [new, old]):
        (rows,) = group_by_setting(records).values()
        assert [row.seconds and row.seconds["first token"] for row in rows] == [84, 35, 14]
        assert rows[2].ratio == TimeRatio(3.0, 2.0, 4.0), "the ratio of its own record"


def test_group_by_setting_different_settings_stay_separate() -> None:
    records = [
        cost_record(),
        cost_record(tiles=2),
        cost_record(machine="another"),
        cost_record(PAPER_ARCHITECTURE),
        cost_record(),
    ]
    records[-1]["cost"]["text"] = 61
    assert len(group_by_setting(records)) == 5


def bar_heights(axes: Any, index: int) -> list[float]:
    """Return the heights of the components of one bar."""
    return [bar[index].get_height() for bar in axes.containers]


def test_component_bars_stack_to_time_and_flops() -> None:
    figure = component_bars(
        group_by_setting([cost_record(PAPER_ARCHITECTURE), cost_record(PAPER_ARCHITECTURE, tiles=2)])
    )
    flops, time, tiled_flops, tiled_time = figure.axes
    assert flops.get_ylabel() == "TFLOPs to the first token"
    assert [sum(bar_heights(flops, index)) for index in range(3)] == pytest.approx([60, 54, 48])
    assert [sum(bar_heights(time, index)) for index in range(3)] == pytest.approx([42000, 17500, 14000])
    assert bar_heights(time, 0)[-1] == pytest.approx(6000), "the time between components"
    printed = [axes.get_lines()[0].get_xydata().tolist() for axes in (flops, time, tiled_flops)]
    assert printed[0] == [[0, 8.55], [1, 1.96], [2, 2.01]]
    assert printed[1] == [[0, 113.04], [1, 38.64], [2, 38.84]]
    assert printed[2] == [[0, 40.49], [1, 7.19]]
    assert not tiled_time.get_lines(), "the paper prints no value"
    assert not any(axes.get_lines() for axes in component_bars(group_by_setting([cost_record()])).axes), (
        "another geometry"
    )


def test_memory_curves_show_peak_against_frames() -> None:
    (axes,) = memory_curves(group_by_setting([cost_record(PAPER_ARCHITECTURE)])).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines["1 token"] == [[1, 104], [11, 134]]
    assert lines["LLaVA"] == [[1, 103]]
    assert lines["printed, 1 token"] == [[1, 15.2 * 1024], [10000, 21.5 * 1024]]
    assert axes.get_ylabel() == "peak memory (MiB)"


def test_main_writes_all_files_and_reports_missing_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = write_records(tmp_path, cost_record(frames=[1]))
    (results / "cost" / "cut.json").write_text('{"cost": {"geom')
    (results / "cost" / "older.json").write_text(json.dumps({**cost_record(), "machine": None} | {"cost": {}}))
    assert paper_tables.main(["--results", str(results)]) == 0
    output = capsys.readouterr()
    report = results / "cost" / "report"
    assert {path.name for path in report.iterdir()} == {
        *(f"{name}.{kind}" for name in ("table13", "table14", "memory") for kind in ("md", "tex", "csv")),
        *("figure7.png", "figure7.pdf"),
    }
    assert "figure8 not drawn: no record has cost.tiles=2" in output.out
    assert "`python -m experiments.run experiment=cost cost.tiles=2`" in output.out
    assert "figure9 not drawn" in output.out
    assert "warning: left out cut.json: not valid JSON (truncated?)" in output.err
    assert "warning: left out older.json: lacks cost.geometry" in output.err
    with (report / "table13.csv").open() as file:
        assert [row["tokens"] for row in csv.DictReader(file)] == ["", "1", "4"]


def test_write_paper_tables_record_order_does_not_change_files(tmp_path: Path) -> None:
    records = [
        cost_record(frames=[1]),
        cost_record(frames=[1], machine="another"),
        cost_record(frames=[1], started="2026-02-01"),
    ]
    for name, order in (("a", records), ("b", records[::-1])):
        paper_tables.write_paper_tables(order, tmp_path / name)
    paths = list((tmp_path / "a").iterdir())
    assert len(paths) == 11
    for path in paths:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_write_paper_tables_removes_figure_without_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper_tables, "save", lambda figure, stem: [stem.with_suffix(".png").write_text("drawn")])
    paper_tables.write_paper_tables([cost_record(), cost_record(tiles=2)], tmp_path)
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == ["figure7", "figure8", "figure9"]
    paper_tables.write_paper_tables([cost_record(frames=[1])], tmp_path)
    assert [path.stem for path in tmp_path.glob("*.png")] == ["figure7"]


def test_main_without_records_prints_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert paper_tables.main(["--results", str(tmp_path)]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "python -m experiments.run experiment=cost" in lines[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record["rows"].pop(0), "lacks a row of LLaVA"),
        (lambda record: record["rows"][1].pop("size"), "lacks rows.1.size"),
        (lambda record: record.pop("pixels"), "lacks pixels"),
        (lambda record: record["provenance"].clear(), "lacks provenance.started"),
    ],
)
def test_read_cost_record_incomplete_record_raises(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    record = cost_record(frames=[1])
    change(record)
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        read_cost_record(path)
    assert load_cost_records(tmp_path)[0] == []


def test_setting_and_model_have_readable_names() -> None:
    (setting,) = group_by_setting([cost_record()])
    assert setting == CostSetting("smol", 336, 1, 60, 4, "bfloat16", "a device")
    assert str(setting) == "smol, 336 px, bfloat16, a device"
    row = MeasuredModel(
        {"memory": {"resident": 1, "allocated": 2, "reserved": 3}, "model": "LLaVA-Mini, 1 token"}, None
    )
    assert (row.peak, row.name) == (2, "1 token")
