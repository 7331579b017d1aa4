"""`python -m experiments.report`: every record found becomes tables, figures and one page."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from experiments.report import (
    asked,
    captions,
    figures,
    formats,
    kinds,
    page,
    row_tables,
    sight,
    summary,
    tables,
    verdict,
)
from experiments.report.asked import Asked
from experiments.report.cells import Cell, ablation_cells, group_cells
from experiments.report.definitions import Definition, definitions
from experiments.report.records import Records, chosen, load, of_attention
from experiments.report.studies import Study, study_of

_WRITERS = {"md": formats.markdown, "tex": formats.latex, "csv": formats.csv}


def main(argv: Sequence[str] | None = None) -> int:
    """Make the report. Returns the exit status: 1 if what was asked for is not there or the folder cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__)
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="folder that holds records/ (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=None, help="where the report goes (RESULTS/report)")
    parser.add_argument(
        "asked",
        nargs="*",
        metavar="KEY=VALUE",
        help="experiment=NAME,... reports on these tables alone; other settings choose among their cells: train.steps=60",
    )
    arguments = parser.parse_args(argv)
    out = arguments.out or arguments.results / "report"
    try:
        write(load(arguments.results / "records"), out, asked.parse(arguments.asked))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def write(records: Records, out: Path, wanted: Asked) -> None:
    """Write the report into `out` and print its summary.

    Everything is made in a folder beside `out` and then moved file by file, the page last: a report that breaks off
    leaves the one before it as it was. A report on some experiments alone leaves the figures and tables of others away.

    Raises:
        OSError: if `out` cannot be written.
        ValueError: if an experiment has no record, or there is no such experiment or setting.
    """
    if records.unreadable:
        named = "; ".join(f"{hole.name}: {hole.reason}" for hole in records.unreadable)
        print(f"warning: {len(records.unreadable)} record(s) left out: {named}", file=sys.stderr)
    known = definitions()
    records = wanted.records(records)
    cells = group_cells(records)
    studies = _studies(wanted, known, cells)
    if wanted.experiments:
        records = chosen(records, (record for study in studies for record in study.records))
        cells = group_cells(records)
    probed = verdict.probed(records)
    verdicts = [verdict.judge(record) for record in probed]
    headline = verdict.headline(verdicts)
    ablation = ablation_cells(_elsewhere(cells, studies, known))
    failed_probes = [record for record in records.failed if of_attention(record)]
    made = [
        *row_tables.study_tables(studies),
        tables.ablation_table(ablation),
        tables.fusion_table(verdicts, failed_probes),
        sight.sight_table(probed),
        kinds.kinds_table(cells, probed),
        kinds.removal_kinds_table(probed),
        tables.provenance_table(records),
    ]

    with _writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".report-", dir=out.parent))
    try:
        (aside / "tables").mkdir()
        for table in made:
            for suffix, format_ in _WRITERS.items():
                (aside / "tables" / f"{table.name}.{suffix}").write_text(format_(table), encoding="utf-8")
        # A lens decides nothing: who has it alone is not judged, and drawn all the same.
        seen = (*probed, *(record for record in records.finished if record.get("lens") is not None))
        drawings = list(captions.draw(studies, seen, ablation))
        pictures = {d.stem: figures.save(d.figure, aside / "figures" / d.stem)[0] for d in drawings if d.figure}
        text = page.render(records, headline, verdicts, studies, made, drawings, pictures)
        (aside / "index.html").write_text(text, encoding="utf-8")
        with _writing(out):
            _move(aside, out, known)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    # Where output is piped there is no width to keep to; 120 columns hold the table.
    console = Console(width=None if sys.stdout.isatty() else 120)
    summary.show(console, headline, verdicts, studies, made, out / "index.html")


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written ({error.strerror}): --out FOLDER puts the report elsewhere"
        ) from None


def _studies(wanted: Asked, known: Sequence[Definition], cells: Sequence[Cell]) -> list[Study]:
    found = []
    for definition in wanted.definitions(known):
        study = study_of(definition, cells, asked=bool(wanted.experiments))
        if study is not None:
            found.append(study)
        elif wanted.experiments:
            run = f"python -m experiments.run -m experiment={definition.name}"
            raise ValueError(f"experiment {definition.name}: no record belongs to it; make some with `{run}`")
    return found


def _elsewhere(cells: Sequence[Cell], studies: Sequence[Study], known: Sequence[Definition]) -> list[Cell]:
    """The cells that no study shows, or that were run for something else as well."""
    shown = {record["id"] for study in studies for record in study.records}
    names = {definition.name for definition in known}
    return [c for c in cells if not all(r["id"] in shown and r["experiment"] in names for r in c.records)]


def _move(aside: Path, out: Path, known: Sequence[Definition]) -> None:
    made = sorted(path.relative_to(aside) for path in aside.rglob("*") if path.is_file())
    # What an earlier report made and these records no longer give would contradict the page.
    names = [definition.name for definition in known]
    stems = [*captions.STEMS, *(name + end for name in names for end in ("", captions.COST))]
    files = {f"figures/{stem}.{suffix}" for stem in stems for suffix in ("png", "pdf")}
    files |= {f"tables/{name}{end}.{suffix}" for name in names for end in ("", "_orderings") for suffix in _WRITERS}
    for stale in files - {path.as_posix() for path in made}:
        (out / stale).unlink(missing_ok=True)
    for path in sorted(made, key=lambda path: path.name == "index.html"):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(aside / path, out / path)


if __name__ == "__main__":
    gc.disable()  # the program ends before what it would collect is worth the search
    sys.exit(main())
