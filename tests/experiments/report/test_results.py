"""Tests of the report as an object: `load`, outcomes, tables, figures and claims."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.report import load
from experiments.report.__main__ import main
from experiments.report.results import Report
from experiments.report.tables import writers

RecordList = list[dict[str, Any]]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, make_results: Callable[[Path], Path]) -> Report:
    return load(make_results(tmp_path_factory.mktemp("study") / "results"))


@pytest.mark.parametrize("part", ["finished", "failed"])
def test_report_records_are_those_of_the_folder(report: Report, records: RecordList, part: str) -> None:
    expected = {record["id"] for record in records if record["status"] == part}
    assert {record["id"] for record in getattr(report.records, part)} == expected


def test_frame_has_one_row_for_each_record_and_question(report: Report, records: RecordList) -> None:
    frame = report.frame()
    finished = [record for record in records if record["status"] == "finished"]
    assert len(frame) == 120 * len(finished)
    record = records[5]
    rows = frame[frame.record == record["id"]]
    assert list(rows.question) == list(range(120))
    assert list(rows.question_type) == record["data"]["kinds"]
    for column in ("image", "blank", "shuffled"):
        assert "".join(rows[column].astype(int).astype(str)) == record["accuracy"][column]
    assert "".join(rows.guess.astype(int).astype(str)) == record["data"]["guess"]
    settings = rows[["experiment", "name", "seed", "model", "visual_tokens", "compressor", "prefusion_layers"]]
    model = record["model"]
    assert settings.drop_duplicates().to_numpy().tolist() == [
        [
            record["experiment"],
            record["name"],
            record["config"]["seed"],
            model["label"],
            model["visual_tokens"],
            model["compressor"],
            model["prefusion_layers"],
        ]
    ]


def test_frame_missing_outcomes_are_nan(records: RecordList, write_records: Callable[[RecordList], Path]) -> None:
    del records[0]["accuracy"]["blank"]
    records[0]["data"]["guess"] = None
    frame = load(write_records(records)).frame()
    without = frame[frame.record == records[0]["id"]]
    assert without[["blank", "guess"]].isna().all(axis=None)
    assert not without[["image", "shuffled"]].isna().any(axis=None)
    assert not frame[frame.record == records[1]["id"]][["blank", "guess"]].isna().any(axis=None)


def test_frame_without_finished_record_is_empty_with_the_same_columns(
    report: Report, records: RecordList, write_records: Callable[[RecordList], Path]
) -> None:
    frame = load(write_records([record for record in records if record["status"] == "failed"])).frame()
    assert frame.empty
    assert list(frame.columns) == list(report.frame().columns)


def test_frame_of_an_experiment_has_row_labels() -> None:
    report = load(Path(__file__).parents[3] / "results" / "tiny")
    frame = report.frame("table6_prefusion")
    results = report.experiments["table6_prefusion"]
    for row in results.finished_rows:
        np.testing.assert_allclose(frame[frame.row == row.label].image.mean(), row.outcomes.mean())
    assert set(frame.record) == {record["id"] for record in results.records}


def test_table_is_displayed_with_caption_notes_and_bold_cells(report: Report) -> None:
    table = report.table("sight")
    html = table._repr_html_()
    assert html.startswith("<p><b>Blind controls")
    assert "</b></p><table>" in html
    assert html.count("<tr>") == len(table.text) + 1
    assert "&lt; 0.001" in html
    assert "<script" not in html


def test_latex_is_the_written_table(report: Report) -> None:
    assert report.latex("sight") == writers.latex(report.table("sight"))


def test_figure_is_drawn_and_displayed(report: Report) -> None:
    figure = report.figure("removal_by_block")
    assert len(figure.axes) == 2
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


def test_claims_returns_the_rows_of_the_claims_table(report: Report) -> None:
    claims = report.claims().set_index("claim")
    outcomes = report.probed[0]["removal"]["onward"]
    none, half, whole = (np.mean([digit == "1" for digit in outcomes[layers]["correct"]]) for layers in (0, 3, 6))
    assert claims.value["image_may_leave"] == pytest.approx((half - none) / (whole - none))
    assert claims.records["image_may_leave"] == report.probed[0]["id"]
    assert list(report.table("claims").text["Answer"]) == list(claims.answer)
    assert set(claims.answer) <= {"holds", "does not hold", "cannot be told"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda report: report.table("sights"), r"table 'sights'.*fusion_depth.*sight"),
        (lambda report: report.figure("removal"), r"figure 'removal'.*removal_by_block"),
        (lambda report: report.frame("table6"), r"experiment 'table6'"),
    ],
)
def test_unknown_name_raises_with_the_known_names(
    report: Report, call: Callable[[Report], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(report)


def test_figure_without_measurements_raises_with_the_reason(
    records: RecordList, write_records: Callable[[RecordList], Path]
) -> None:
    report = load(write_records(records[:4]))
    with pytest.raises(ValueError, match=r"'removal_by_block'.*no finished record holds removal"):
        report.figure("removal_by_block")


def test_load_request_selects_records(records: RecordList, write_records: Callable[[RecordList], Path]) -> None:
    results = write_records(records)
    assert {record["config"]["seed"] for record in load(results, "seed=1").records.finished} == {1}
    with pytest.raises(ValueError, match="seed=9: no record has this setting"):
        load(results, "seed=9")


def test_load_folder_without_records_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="records"):
        load(tmp_path)


def test_import_of_the_package_is_light() -> None:
    script = "import sys, experiments.report; print({'pandas', 'matplotlib', 'numpy'} & sys.modules.keys())"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_report_copies_the_attention_page_of_the_newest_attention_experiment(
    records: RecordList, write_records: Callable[[RecordList], Path], tmp_path: Path
) -> None:
    newest, oldest, other = records[:3]
    for record, year in ((newest, 2026), (oldest, 2025), (other, 2027)):
        record["provenance"]["started"] = f"{year}-01-01T00:00:00+00:00"
    newest["experiment"] = oldest["experiment"] = "attention"
    folder = write_records([newest, oldest, other])
    (folder / "views").mkdir()
    for record in (newest, oldest, other):
        (folder / "views" / f"{record['id']}.html").write_text(f"page of {record['id']}")
    command = [f"results={folder}", "--out", str(tmp_path / "report")]
    assert main(command) == 0
    assert (tmp_path / "report" / "view.html").read_text() == f"page of {newest['id']}"
    assert 'href="view.html"' in (tmp_path / "report" / "index.html").read_text()
    for page in (folder / "views").iterdir():
        page.unlink()
    assert main(command) == 0
    assert not (tmp_path / "report" / "view.html").exists()
    assert "view.html" not in (tmp_path / "report" / "index.html").read_text()
