"""TODO"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from experiments.records.files import Records, chosen
from experiments.records.views import of_attention
from experiments.report import captions, figures, html, tables, terminal, verdict
from experiments.report.experiment_results import Study, study_of
from experiments.report.experiment_specs import Definition, definitions
from experiments.report.request import Asked
from experiments.report.run_groups import Cell, ablation_cells, group_cells
from experiments.report.tables import ablation as ablation_module
from experiments.report.tables import blind_controls, fusion_depth, provenance, question_types, writers

_WRITERS = {"md": writers.markdown, "tex": writers.latex, "csv": writers.csv}


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
        *tables.study_tables(studies),
        ablation_module.ablation_table(ablation),
        fusion_depth.fusion_table(verdicts, failed_probes),
        blind_controls.sight_table(probed),
        question_types.kinds_table(cells, probed),
        question_types.removal_kinds_table(probed),
        provenance.provenance_table(records),
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
        text = html.render(records, headline, verdicts, studies, made, drawings, pictures)
        (aside / "index.html").write_text(text, encoding="utf-8")
        with _writing(out):
            _move(aside, out, known)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    # Where output is piped there is no width to keep to; 120 columns hold the table.
    console = Console(width=None if sys.stdout.isatty() else 120)
    terminal.show(console, headline, verdicts, studies, made, out / "index.html")


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
