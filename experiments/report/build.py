"""Writing a report: tables, figures and one HTML page in a folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from experiments.report import figures, html, terminal
from experiments.report.experiment_specs import ExperimentSpec
from experiments.report.figure_entries import EXPERIMENT_SUFFIXES, FIXED_STEMS, PROBE_SEPARATOR, PROBE_STEMS
from experiments.report.results import Report
from experiments.report.tables import writers

WRITERS = {"md": writers.markdown, "tex": writers.latex, "csv": writers.csv}


def write_report(report: Report, out: Path) -> None:
    """Write all tables and figures of a report with its page, and print a summary.

    All files are made in a temporary folder beside `out` and then moved one by one, the page last. If the report fails
    halfway, an earlier one stays unchanged. Files that an earlier report wrote and this one does not are removed.

    Args:
        report: The report.
        out: Folder for `index.html`, `view.html`, `tables/` and `figures/`.

    Raises:
        OSError: if `out` cannot be written.
    """
    tables = report.tables
    with _writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".report-", dir=out.parent))
    try:
        (temporary / "tables").mkdir()
        for table in tables.values():
            for suffix, write in WRITERS.items():
                (temporary / "tables" / f"{table.name}.{suffix}").write_text(write(table), encoding="utf-8")
        entries = report.figures
        images = {e.stem: figures.save(e.draw(), temporary / "figures" / e.stem)[0] for e in entries if e.draw}
        if report.attention_page:
            shutil.copyfile(report.attention_page, temporary / html.ATTENTION_PAGE)
        (temporary / "index.html").write_text(html.render_page(report, images), encoding="utf-8")
        with _writing(out):
            _move_files(temporary, out, report.specs)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    # Piped output has no terminal width; 120 columns fit the table.
    console = Console(width=None if sys.stdout.isatty() else 120)
    terminal.print_summary(console, report, out / "index.html")


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn an OSError into one line that names the folder and the option to change it."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error.strerror}); name another folder with --out FOLDER") from None


def _move_files(temporary: Path, out: Path, specs: Sequence[ExperimentSpec]) -> None:
    made = sorted(path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file())
    # Files of an earlier report that these records no longer give would contradict the page.
    names = [spec.name for spec in specs]
    stems = [*FIXED_STEMS, *(name + ending for name in names for ending in EXPERIMENT_SUFFIXES)]
    possible = {f"figures/{stem}.{suffix}" for stem in stems for suffix in ("png", "pdf")}
    table_names = [*(name + end for name in names for end in ("", "_orderings")), "generated_scores", "benchmarks"]
    possible |= {f"tables/{name}.{suffix}" for name in table_names for suffix in WRITERS}
    possible.add(html.ATTENTION_PAGE)
    earlier = (path for stem in PROBE_STEMS for path in out.glob(f"figures/{stem}{PROBE_SEPARATOR}*"))
    possible |= {path.relative_to(out).as_posix() for path in earlier}
    for stale in possible - {path.as_posix() for path in made}:
        (out / stale).unlink(missing_ok=True)
    for path in sorted(made, key=lambda path: path.name == "index.html"):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary / path, out / path)
