"""The report's HTML page: one file without scripts that needs no network."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

import jinja2

from experiments.records.views import record_label
from experiments.report.figure_entries import EXPERIMENT_SUFFIXES
from experiments.report.results import Report
from experiments.report.verdict import CLAIM, CLAIM_RULE


def render_page(report: Report, images: Mapping[str, Path]) -> str:
    """Render the page: each experiment with its figures and tables, then the other figures and tables.

    Args:
        report: The report.
        images: PNG of every drawn figure by stem; the page embeds them.

    Returns:
        The page as HTML text.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    encoded = {stem: base64.b64encode(path.read_bytes()).decode() for stem, path in images.items()}
    figures = {entry.stem: (entry, encoded.get(entry.stem)) for entry in report.figures}
    experiment_stems = {name + ending for name in report.experiments for ending in EXPERIMENT_SUFFIXES}
    return environment.get_template("page.html.j2").render(
        claim=CLAIM,
        rule=CLAIM_RULE,
        headline=report.headline,
        verdicts=report.verdicts,
        experiments=list(report.experiments),
        tables=report.tables,
        figures=figures,
        other_figures=[figure for stem, figure in figures.items() if stem not in experiment_stems],
        experiment_suffixes=EXPERIMENT_SUFFIXES,
        records=report.records,
        record_label=record_label,
    )
