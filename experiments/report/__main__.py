"""`python -m experiments.report`: every record found becomes tables, figures and one page."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from experiments.report import captions, figures, formats, page, summary, tables, verdict
from experiments.report.cells import ablation_cells, group_cells
from experiments.report.records import Records, load

_WRITERS = {"md": formats.markdown, "tex": formats.latex, "csv": formats.csv}


def main(argv: Sequence[str] | None = None) -> int:
    """Make the report. Returns the exit status: 1 if there is no record or the folder cannot be written, else 0."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__)
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="folder that holds records/ (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=None, help="where the report goes (RESULTS/report)")
    arguments = parser.parse_args(argv)
    out = arguments.out or arguments.results / "report"
    try:
        records = load(arguments.results / "records")
        write(records, out)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def write(records: Records, out: Path) -> None:
    """Write the report into `out` and print its summary.

    Everything is made in a folder beside `out` and then moved file by file, the page last: a report that breaks off
    leaves the one before it as it was. Raises OSError if `out` cannot be written.
    """
    if records.unreadable:
        named = "; ".join(f"{hole.name}: {hole.reason}" for hole in records.unreadable)
        print(f"warning: {len(records.unreadable)} record(s) left out: {named}", file=sys.stderr)
    probed = verdict.probed(records)
    verdicts = [verdict.judge(record) for record in probed]
    headline = verdict.headline(verdicts)
    cells = ablation_cells(group_cells(records))
    failed_probes = [record for record in records.failed if record["experiment"] == "attention"]
    made = (
        tables.ablation_table(cells),
        tables.kinds_table(cells, probed),
        tables.fusion_table(verdicts, failed_probes),
        tables.provenance_table(records),
    )
    by_name = {table.name: table for table in made}

    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".report-", dir=out.parent))
    try:
        (aside / "tables").mkdir()
        for table in made:
            for suffix, format_ in _WRITERS.items():
                (aside / "tables" / f"{table.name}.{suffix}").write_text(format_(table), encoding="utf-8")
        drawings = list(captions.draw(probed, cells))
        pictures = {d.stem: figures.save(d.figure, aside / "figures" / d.stem)[0] for d in drawings if d.figure}
        text = page.render(records, headline, verdicts, by_name, drawings, pictures)
        (aside / "index.html").write_text(text, encoding="utf-8")
        _move(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    # Where output is piped there is no width to keep to; 120 columns hold the table.
    console = Console(width=None if sys.stdout.isatty() else 120)
    summary.show(console, headline, verdicts, by_name["ablation"], out / "index.html")


def _move(aside: Path, out: Path) -> None:
    made = sorted(path.relative_to(aside) for path in aside.rglob("*") if path.is_file())
    # A figure of an earlier report that these records no longer give would contradict the page.
    for stem in captions.STEMS:
        for suffix in ("png", "pdf"):
            if Path("figures", f"{stem}.{suffix}") not in made:
                (out / "figures" / f"{stem}.{suffix}").unlink(missing_ok=True)
    for path in sorted(made, key=lambda path: path.name == "index.html"):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(aside / path, out / path)


if __name__ == "__main__":
    sys.exit(main())
