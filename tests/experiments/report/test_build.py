"""Tests of `python -m experiments.report`: files, page, terminal output and errors."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.report import figure_entries, html
from experiments.report import results as results_module
from experiments.report.__main__ import main

GOLDEN = Path(__file__).parent / "golden"
Records = list[dict[str, Any]]
Write = Callable[[Records], Path]
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Parser that checks the nesting of tags, and collects references and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.images_without_text = 0
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for key, value in attrs if key == "id"]
        self.images_without_text += tag == "img" and not dict(attrs).get("alt")
        self.references += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_results: Callable[[Path], Path]) -> Path:
    """Results folder with a complete report, made once because drawing takes seconds."""
    results = make_results(tmp_path_factory.mktemp("whole") / "results")
    assert main(["--results", str(results)]) == 0
    return results


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip drawing in tests that do not look at figures."""
    monkeypatch.setattr(
        results_module,
        "figure_entries",
        lambda experiments, *_: [figure_entries.FigureEntry(e.name, "", "left out", None) for e in experiments],
    )


def as_table6(records: Records) -> Records:
    """Turn records into those of the project's Table 6, with a data setting that the ablation does not have."""
    for record in records:
        record["experiment"] = record["config"]["name"] = "table6_prefusion"
        record["config"]["data"]["test_samples"] = 120
        if record["config"]["compressor"]["name"] == "none":
            record["config"]["compressor"]["size"] = 1
    return [record for record in records if record["config"]["compressor"]["name"] != "average"]


def read(results: Path) -> Page:
    return Page((results / "report" / "index.html").read_text(encoding="utf-8"))


def test_write_report_whole_study_writes_all_files(whole: Path) -> None:
    names = (
        "ablation",
        "accuracy_by_kind",
        "claims",
        "claims_by_question_type",
        "fusion_depth",
        "knockout_by_kind",
        "onset",
        "provenance",
        "removal_by_kind",
        "sight",
    )
    drawn = {*figure_entries.FIXED_STEMS} - {"swaps_by_property"}  # which an experiment of its own measures
    tables = {f"tables/{name}.{suffix}" for name in names for suffix in ("md", "tex", "csv")}
    wanted = {"index.html"} | tables | {f"figures/{stem}.{suffix}" for stem in drawn for suffix in ("png", "pdf")}
    report = whole / "report"
    found = {path.relative_to(report).as_posix(): path.stat().st_size for path in report.rglob("*") if path.is_file()}
    assert set(found) == wanted
    assert all(found.values())
    assert sorted(path.name for path in whole.iterdir()) == ["records", "report"]


def test_page_is_self_contained_and_its_links_exist(whole: Path) -> None:
    page = read(whole)
    assert {"link", "iframe"}.isdisjoint(page.tags)
    embedded = [reference for reference in page.references if reference.startswith("data:")]
    assert len(embedded) == 11
    links = {reference for reference in page.references if reference.startswith("#")}
    assert len(links) > 10
    assert {link.removeprefix("#") for link in links} <= set(page.ids)
    for reference in set(page.references) - set(embedded) - links:
        assert (whole / "report" / reference).is_file()
    raw = (whole / "report" / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", raw)
    assert "Text attends to the image more in the first third" in page.text
    assert "tiny | average 2x2, 2 pre-fusion layers, seed 1 : failed: RuntimeError: out of memory" in page.text


def test_page_opens_with_claims_removal_and_ablation_and_folds_the_rest(whole: Path) -> None:
    page = read(whole)
    assert page.images_without_text == 0
    raw = (whole / "report" / "index.html").read_text(encoding="utf-8")
    unfolded = re.sub(r"<details.*?</details>", "", raw, flags=re.DOTALL)
    assert re.findall(r'<section id="(\w+)">', unfolded) == ["claims", "removal_by_block", "ablation"]
    assert unfolded.count("<img") == 2
    assert unfolded.count("<table") == 2
    assert raw.count("<details") > 8


def test_page_allows_its_own_script_alone(whole: Path) -> None:
    raw = (whole / "report" / "index.html").read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", raw, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}&#39;" in raw or f"script-src 'sha256-{digest}'" in raw


@pytest.mark.usefixtures("undrawn")
def test_summary_prints_claims_one_table_and_page_in_25_lines(
    records: Records, table_records: Records, write_records: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    results = write_records([*records, *as_table6(table_records)])
    assert main(["--results", str(results)]) == 0
    output = capsys.readouterr()
    assert len(output.out.splitlines()) <= 25
    assert re.search(r"The image can leave after half of the layers +\d", output.out)
    assert "64.2 [55.8, 72.5]" in output.out
    assert "Also on the page: table6_prefusion" in output.out
    assert str(results / "report" / "index.html") in output.out.replace("\n", "")
    assert output.err == ""


@pytest.mark.usefixtures("undrawn")
def test_unreadable_record_is_one_warning_and_a_missing_entry(
    records: Records, write_records: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    results = write_records(records)
    (results / "records" / "broken.json").write_text('{"schema": 1, "id": "<b>')
    assert main(["--results", str(results)]) == 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "broken.json" in error
    assert "broken.json : not valid JSON" in read(results).text


@pytest.mark.usefixtures("undrawn")
def test_page_escapes_text_of_records(records: Records, write_records: Write) -> None:
    records[-1]["name"] = "<script>alert(1)</script> & co"
    results = write_records(records)
    main(["--results", str(results)])
    page = read(results)
    assert page.tags.count("script") == 1
    assert "<script>alert(1)</script> & co" in page.text


def test_failed_records_alone_make_a_page_of_missing_results(
    records: Records, write_records: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    results = write_records([record for record in records if record["status"] == "failed"])
    assert main(["--results", str(results)]) == 0
    text = read(results).text
    assert "cannot be told" in text
    assert "Not drawn" in text
    assert "out of memory" in text
    assert "These records hold no measurement" in capsys.readouterr().out


def test_main_folder_without_records_is_one_error_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--results", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path / "records") in error
    assert "python -m experiments.run" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("undrawn")
def test_write_report_failure_keeps_the_earlier_report(
    records: Records, write_records: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = write_records(records)
    main(["--results", str(results)])
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    monkeypatch.setattr(html, "render_page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["--results", str(results)])
    assert {path: path.read_bytes() for path in results.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("undrawn")
def test_write_report_removes_stale_figures(records: Records, write_records: Write) -> None:
    results = write_records(records)
    figures = results / "report" / "figures"
    figures.mkdir(parents=True)
    for name in ("removal_by_block.png", "removal_by_block.pdf", "mine.png"):
        (figures / name).write_bytes(b"old")
    main(["--results", str(results)])
    assert [path.name for path in figures.iterdir()] == ["mine.png"]


def test_lens_alone_is_drawn_and_tests_no_claim(records: Records, write_records: Write) -> None:
    others = ("removal", "onset", "attention", "contribution", "sinks", "knockout", "readout", "fusion")
    results = write_records([records[-1] | dict.fromkeys(others)])
    assert main(["--results", str(results)]) == 0
    drawn = {path.name for path in (results / "report" / "figures").iterdir()}
    assert drawn == {"lens_by_layer.png", "lens_by_layer.pdf"}
    assert "These records hold no measurement" in read(results).text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("blocked", ["", "report", "report/tables"])
def test_main_unwritable_folder_is_one_error_line(
    records: Records, write_records: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], blocked: str
) -> None:
    out = tmp_path / "there" / "report"
    path = tmp_path / "there" / blocked
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")  # a file where a folder is needed: it stops even root
    assert main(["--results", str(write_records(records)), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"error: {out if blocked else out.parent} cannot be written (")
    assert "--out FOLDER" in error
    assert not list(tmp_path.rglob(".report-*"))


@pytest.mark.usefixtures("undrawn")
def test_experiment_table_removes_its_groups_from_the_ablation(
    records: Records, write_records: Write, table_records: Records, capsys: pytest.CaptureFixture[str]
) -> None:
    results = write_records([*records, *as_table6(table_records)])
    assert main(["--results", str(results)]) == 0
    tables = results / "report" / "tables"
    assert (tables / "ablation.md").read_text() == (GOLDEN / "ablation.md").read_text()
    assert "| 16 tokens | query | 0 | 4 |" in (tables / "table6_prefusion.md").read_text()
    assert (tables / "table6_prefusion_orderings.tex").read_text().startswith(r"\begin{table*}")
    assert not (tables / "table8_compression.md").exists()
    page = read(results)
    assert "Table 6: " in page.text
    assert "the paper orders the same way" in page.text
    assert "Also on the page: table6_prefusion" in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_request_for_one_experiment_covers_only_its_records(
    records: Records, write_records: Write, table_records: Records, capsys: pytest.CaptureFixture[str]
) -> None:
    results = write_records([*records, *as_table6(table_records)])
    stale = results / "report" / "tables" / "table8_compression_orderings.csv"
    stale.parent.mkdir(parents=True)
    figure = results / "report" / "figures" / "table8_compression_cost.png"
    figure.parent.mkdir()
    for name in (stale, stale.with_name("mine.csv"), figure):
        name.write_text("")
    assert main(["--results", str(results), "experiment=table6_prefusion", "model=tiny"]) == 0
    assert not stale.exists()
    assert not figure.exists()
    assert stale.with_name("mine.csv").exists()
    page = read(results)
    assert "Table 6" in page.text
    assert "Figure 5" not in {word.strip() for word in page.words}
    assert "Not drawn" not in page.text
    assert "10 finished and 1 failed records" in page.text
    assert "average" not in (results / "report" / "tables" / "ablation.md").read_text()
    assert "16 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experiment=table6"], "experiment: there is no table 'table6'; choose from "),
        (["experiment=table7_tokens"], "experiment table7_tokens: no record belongs to it; run `python -m"),
        (["train.max_steps=61"], "train.max_steps=61: no record has this setting; recorded values: 200"),
        (["table6_prefusion"], "'table6_prefusion' is not a setting; write KEY=VALUE"),
    ],
)
def test_main_request_that_selects_nothing_is_one_error_line(
    write_records: Write, table_records: Records, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    results = write_records(as_table6(table_records))
    assert main(["--results", str(results), *words]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (results / "report").exists()


@pytest.mark.usefixtures("undrawn")
def test_report_is_independent_of_record_file_names(records: Records, table_records: Records, tmp_path: Path) -> None:
    made = [*records, *as_table6(table_records)]
    written: list[dict[str, bytes]] = []
    for number, order in enumerate((made, made[::-1])):
        folder = tmp_path / str(number) / "records"
        folder.mkdir(parents=True)
        for place, record in enumerate(order):
            (folder / f"{place:03d}.json").write_text(json.dumps(record))
        assert main(["--results", str(folder.parent)]) == 0
        report = folder.parent / "report"
        written.append({p.relative_to(report).as_posix(): p.read_bytes() for p in report.rglob("*") if p.is_file()})
    assert written[0] == written[1]


def test_report_imports_no_model(write_records: Write, table_records: Records) -> None:
    results = write_records(as_table6(table_records))
    script = (
        "import sys\n"
        "from experiments.report.__main__ import main\n"
        f"assert main(['--results', {str(results)!r}, 'experiment=table6_prefusion']) == 0\n"
        "ours = [n for n in sys.modules if n.startswith('experiments.')]\n"
        "ours = {n.split('.')[1] for n in ours}\n"
        "heavy = {'torch', 'transformers', 'hydra', 'probes', 'llava_mini', 'matplotlib.pyplot'} & sys.modules.keys()\n"
        "print(sorted(ours), sorted(heavy))"
    )
    root = Path(html.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['config', 'data', 'files', 'markdown', 'records', 'report'] []"
    drawn = results / "report" / "figures"
    stems = ("claims", "table6_prefusion", "table6_prefusion_cost")
    assert {path.name for path in drawn.iterdir()} == {f"{stem}.{end}" for stem in stems for end in ("png", "pdf")}
    page = read(results)
    assert {f"figures/{stem}.pdf" for stem in stems} <= set(page.references)
    assert "Accuracy against cost: table6_prefusion" in page.text
    assert page.tags.count("img") == 3


@pytest.mark.usefixtures("undrawn")
def test_tables_without_rows_have_a_header_in_csv(records: Records, write_records: Write) -> None:
    failed = write_records([record for record in records if record["status"] == "failed"])
    assert main(["--results", str(failed)]) == 0
    paths = sorted((failed / "report" / "tables").glob("*.csv"))
    read_back = {path.stem: pd.read_csv(path) for path in paths}
    empty = {name for name, table in read_back.items() if table.empty}
    assert empty >= {"sight", "accuracy_by_kind", "removal_by_kind"}
    full = {path.stem: pd.read_csv(path) for path in GOLDEN.glob("*.csv")}
    for name in empty:
        assert list(read_back[name].columns) == list(full[name].columns[: len(read_back[name].columns)])
