"""The reports in results/ are what today's code makes of the records there."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.benchmarks.model_cost import paper_tables
from experiments.report import html, load
from experiments.report.build import WRITERS

RESULTS = Path(__file__).resolve().parents[3] / "results"


@pytest.mark.parametrize("study", ["tiny", "smol"])
def test_shipped_report_is_what_the_code_makes_of_its_records(study: str) -> None:
    """Figures are compared by name; that of the page compares the embedded ones with their files."""
    report, shipped = load(RESULTS / study), RESULTS / study / "report"
    made = {
        f"tables/{table.name}.{suffix}": write(table)
        for table in report.tables.values()
        for suffix, write in WRITERS.items()
    }
    images = {entry.stem: shipped / "figures" / f"{entry.stem}.png" for entry in report.figures if entry.draw}
    made["index.html"] = html.render_page(report, images)
    stale = [name for name, text in made.items() if (shipped / name).read_bytes() != text.encode()]
    assert not stale, f"run `python -m experiments.report results=results/{study}` and commit what it writes"
    figures = {f"figures/{stem}.{suffix}" for stem in images for suffix in ("png", "pdf")}
    found = {path.relative_to(shipped).as_posix() for path in shipped.rglob("*") if path.is_file()}
    assert found == made.keys() | figures


def test_shipped_cost_report_is_what_the_code_makes_of_its_records(tmp_path: Path) -> None:
    shipped = RESULTS / "cpu" / "cost"
    (tmp_path / "cost").mkdir()
    for path in shipped.glob("*.json"):
        (tmp_path / "cost" / path.name).write_bytes(path.read_bytes())
    paper_tables.main(["--results", str(tmp_path)])
    made = tmp_path / "cost" / "report"
    assert {path.name for path in made.iterdir()} == {path.name for path in (shipped / "report").iterdir()}
    stale = [
        path.name
        for path in made.iterdir()
        if path.suffix in (".md", ".tex", ".csv") and path.read_bytes() != (shipped / "report" / path.name).read_bytes()
    ]
    assert not stale, "run `python -m experiments.benchmarks.model_cost.paper_tables --results results/cpu` and commit"
