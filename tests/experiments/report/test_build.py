from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from experiments.report import captions, html
from experiments.report.__main__ import main

GOLDEN = Path(__file__).parent / "golden"
Records = list[dict[str, Any]]
Write = Callable[[Records], Path]
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and collects references and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
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
    """The results folder of a whole report: drawing takes seconds, so it is made once."""
    results = make_results(tmp_path_factory.mktemp("whole") / "results")
    assert main(["--results", str(results)]) == 0
    return results


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures out where they are not the point."""
    blank = "left out"
    monkeypatch.setattr(
        captions, "draw", lambda studies, *_: [captions.Drawing(s.name, "", blank, None) for s in studies]
    )


def as_table6(records: Records) -> Records:
    """Records as those of the table that comes with the project, trained otherwise than those of the ablation."""
    for record in records:
        record["experiment"] = record["config"]["name"] = "table6_prefusion"
        record["config"]["data"]["test"] = 120
        if record["config"]["compressor"]["name"] == "none":
            record["config"]["compressor"]["size"] = 1
    return [record for record in records if record["config"]["compressor"]["name"] != "average"]


def read(results: Path) -> Page:
    return Page((results / "report" / "index.html").read_text(encoding="utf-8"))


def test_a_whole_report(whole: Path) -> None:
    names = ("ablation", "accuracy_by_kind", "fusion_depth", "provenance", "removal_by_kind", "sight")
    drawn = captions.STEMS
    tables = {f"tables/{name}.{suffix}" for name in names for suffix in ("md", "tex", "csv")}
    wanted = {"index.html"} | tables | {f"figures/{stem}.{suffix}" for stem in drawn for suffix in ("png", "pdf")}
    report = whole / "report"
    found = {path.relative_to(report).as_posix(): path.stat().st_size for path in report.rglob("*") if path.is_file()}
    assert set(found) == wanted
    assert all(found.values())
    assert sorted(path.name for path in whole.iterdir()) == ["records", "report"]


def test_the_page_is_self_contained_and_links_to_files_that_exist(whole: Path) -> None:
    found = read(whole)
    assert {"script", "link", "iframe"}.isdisjoint(found.tags)
    embedded = [reference for reference in found.references if reference.startswith("data:")]
    assert len(embedded) == 7
    for reference in set(found.references) - set(embedded):
        assert (whole / "report" / reference).is_file()
    raw = (whole / "report" / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", raw)
    assert "Shallow-layer fusion reproduces here" in found.text
    assert "tiny | average 2x2, 2 pre-fusion layers, seed 1 : failed: RuntimeError: out of memory" in found.text


@pytest.mark.usefixtures("undrawn")
def test_the_summary(records: Records, write_records: Write, capsys: pytest.CaptureFixture[str]) -> None:
    results = write_records(records)
    assert main(["--results", str(results)]) == 0
    said = capsys.readouterr()
    assert "fusion depth from removal: 2 of 6 layers (95% CI 2 to 3, n = 120)" in said.out
    assert "fusion depth from attention: 5 of 6 layers (95% CI 5 to 5, n = 40)" in said.out
    assert "64.2 [55.8, 72.5]" in said.out
    assert str(results / "report" / "index.html") in said.out.replace("\n", "")
    assert said.err == ""


@pytest.mark.usefixtures("undrawn")
def test_a_garbled_record_is_one_warning_and_a_hole(
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
def test_text_from_records_is_escaped(records: Records, write_records: Write) -> None:
    records[-1]["name"] = "<script>alert(1)</script> & co"
    results = write_records(records)
    main(["--results", str(results)])
    found = read(results)
    assert "script" not in found.tags
    assert "<script>alert(1)</script> & co" in found.text


def test_failures_alone_make_a_page_of_holes(
    records: Records, write_records: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    results = write_records([record for record in records if record["status"] == "failed"])
    assert main(["--results", str(results)]) == 0
    text = read(results).text
    assert "cannot be told" in text
    assert "Not drawn" in text
    assert "out of memory" in text
    assert "No finished record holds a probe" in capsys.readouterr().out


def test_no_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--results", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path / "records") in error
    assert "python -m experiments.run" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("undrawn")
def test_a_report_that_breaks_off_leaves_the_old_one(
    records: Records, write_records: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = write_records(records)
    main(["--results", str(results)])
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    monkeypatch.setattr(html, "render", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["--results", str(results)])
    assert {path: path.read_bytes() for path in results.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("undrawn")
def test_a_figure_that_is_no_longer_made_goes_away(records: Records, write_records: Write) -> None:
    results = write_records(records)
    figures = results / "report" / "figures"
    figures.mkdir(parents=True)
    for name in ("removal_by_block.png", "removal_by_block.pdf", "mine.png"):
        (figures / name).write_bytes(b"old")
    main(["--results", str(results)])
    assert [path.name for path in figures.iterdir()] == ["mine.png"]


def test_a_lens_alone_is_drawn_and_not_judged(records: Records, write_records: Write) -> None:
    others = ("removal", "attention", "knockout", "readout", "fusion")
    results = write_records([records[-1] | dict.fromkeys(others)])
    assert main(["--results", str(results)]) == 0
    drawn = {path.name for path in (results / "report" / "figures").iterdir()}
    assert drawn == {"lens_by_layer.png", "lens_by_layer.pdf"}
    assert "No finished record holds a probe" in read(results).text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("blocked", ["", "report", "report/tables"])
def test_a_folder_that_cannot_be_written_is_one_line(
    records: Records, write_records: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], blocked: str
) -> None:
    out = tmp_path / "there" / "report"
    path = tmp_path / "there" / blocked
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")  # where a folder would have to be: it stops root too
    assert main(["--results", str(write_records(records)), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"error: {out if blocked else out.parent} cannot be written (")
    assert "--out FOLDER" in error
    assert not list(tmp_path.rglob(".report-*"))


@pytest.mark.usefixtures("undrawn")
def test_an_experiments_table_takes_its_cells_out_of_the_ablation(
    records: Records, write_records: Write, table_records: Records, capsys: pytest.CaptureFixture[str]
) -> None:
    results = write_records([*records, *as_table6(table_records)])
    assert main(["--results", str(results)]) == 0
    tables = results / "report" / "tables"
    assert (tables / "ablation.md").read_text() == (GOLDEN / "ablation.md").read_text()
    assert "| 16 tokens | query | 0 | 4 |" in (tables / "table6_prefusion.md").read_text()
    assert (tables / "table6_prefusion_orderings.tex").read_text().startswith(r"\begin{table}")
    assert not (tables / "table8_compression.md").exists()
    found = read(results)
    assert "Table 6: what pre-fusion layers are worth" in found.text
    assert "The paper's orderings" in found.text
    said = capsys.readouterr().out
    assert "fusion depth from removal" in said
    assert "16 tokens" in said


@pytest.mark.usefixtures("undrawn")
def test_a_report_on_one_experiment(
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
    found = read(results)
    assert "Table 6" in found.text
    assert "Shallow-layer fusion" not in found.text
    assert "Not drawn" not in found.text
    assert "10 finished and 1 failed records" in found.text
    assert "average" not in (results / "report" / "tables" / "ablation.md").read_text()
    assert "fusion depth" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["experiment=table6"], "experiment: no table 'table6'; there are "),
        (["experiment=table7_tokens"], "experiment table7_tokens: no record belongs to it; make some with `python -m"),
        (["train.steps=61"], "train.steps=61: no record has it; found 200"),
        (["table6_prefusion"], "'table6_prefusion' is no setting; write KEY=VALUE"),
    ],
)
def test_what_is_not_there_is_one_line(
    write_records: Write, table_records: Records, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    results = write_records(as_table6(table_records))
    assert main(["--results", str(results), *words]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert not (results / "report").exists()


@pytest.mark.usefixtures("undrawn")
def test_a_report_does_not_know_how_its_records_were_named(
    records: Records, table_records: Records, tmp_path: Path
) -> None:
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


def test_no_model_is_imported(write_records: Write, table_records: Records) -> None:
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
    assert done.stdout.splitlines()[-1] == "['config', 'records', 'report'] []"
    drawn = results / "report" / "figures"
    stems = ("table6_prefusion", "table6_prefusion_cost")
    assert {path.name for path in drawn.iterdir()} == {f"{stem}.{end}" for stem in stems for end in ("png", "pdf")}
    found = read(results)
    assert {f"figures/{stem}.pdf" for stem in stems} <= set(found.references)
    assert "Accuracy against cost: table6_prefusion" in found.text
    assert found.tags.count("img") == 2
