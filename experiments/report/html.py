"""The report's HTML page: one file that needs no network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path

import jinja2
from markupsafe import Markup

from experiments.report.figure_entries import (
    ABLATION_STEM,
    CURVES_SUFFIX,
    EXPERIMENT_SUFFIXES,
    PROBE_SEPARATOR,
    REMOVAL_STEM,
    FigureEntry,
)
from experiments.report.results import Report
from experiments.report.tables.claims import summarize
from experiments.report.tables.table import Table

ATTENTION_PAGE = "view.html"
"""The attention page, beside the report's page."""

_FOLDER = Path(__file__).parent
_OTHER_TABLES = {
    "benchmarks": "Benchmarks",
    "claims_by_question_type": "Claims by question type",
    "fusion_depth": "Fusion depth",
    "onset": "Fusion onset",
    "sight": "Blind controls",
    "generated_scores": "Scores of generated answers",
    "accuracy_by_kind": "Accuracy by question type",
    "removal_by_kind": "Removal by question type",
    "knockout_by_kind": "Largest loss by knock-out",
    "photo_readout": "Photographs read out of the features",
    "patch_words": "Words of patches",
}
"""Tables that belong to no experiment and are folded, with their titles."""


@dataclass(frozen=True)
class Section:
    """A part of the page with its figures and tables.

    Args:
        anchor: Its identifier in links.
        title: Its heading.
        figures: Figures with their images as base64 text; None if a figure could not be drawn.
        tables: Tables with at least one row.
    """

    anchor: str
    title: str
    figures: tuple[tuple[FigureEntry, str | None], ...]
    tables: tuple[Table, ...]

    @property
    def label(self) -> str:
        """The heading without what follows a colon, for the contents."""
        return self.title.partition(":")[0]


def render_page(report: Report, images: Mapping[str, Path]) -> str:
    """Render the page: the claims, what the image is worth by layer, the ablation; then all else, folded.

    Args:
        report: The report.
        images: PNG of every drawn figure by stem; the page embeds them.

    Returns:
        The page as HTML text.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (_FOLDER / "page_script.js").read_text(encoding="utf-8")
    first, folded = split_sections(report, images)
    return environment.get_template("page.html.j2").render(
        summary=summarize(report.findings),
        claims=report.tables["claims"],
        first=first,
        folded=folded,
        attention_page=ATTENTION_PAGE if report.attention_page else None,
        provenance=report.tables["provenance"],
        records=report.records,
        script=Markup(script),
        # The page may run this script and no other.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def split_sections(report: Report, images: Mapping[str, Path]) -> tuple[list[Section], ...]:
    """Return the sections that the page opens with, and those that it folds.

    The page opens with removal by layer, the ablation and the benchmarks. Without ablation cells, the first experiment
    takes their place.

    Args:
        report: The report.
        images: PNG of every drawn figure by stem.
    """
    ablation = report.tables["ablation"]
    compared = ABLATION_STEM if not ablation.text.empty else next(iter(report.experiments), ABLATION_STEM)
    first, folded = [], []
    for section in _sections(report, images):
        if section.anchor == compared:
            # Learning curves show whether rows of the table were still improving.
            shown = [i == 0 or entry.stem.endswith(CURVES_SUFFIX) for i, (entry, _) in enumerate(section.figures)]
            opening = tuple(compress(section.figures, shown))
            others = tuple(figure for figure in section.figures if figure not in opening)
            first.append(replace(section, figures=opening, tables=section.tables[:1]))
            folded.append(Section(f"{compared}-more", f"More on {section.label}", others, section.tables[1:]))
        else:
            (first if section.anchor in (REMOVAL_STEM, "table-benchmarks") else folded).append(section)
    return tuple([section for section in part if section.figures or section.tables] for part in (first, folded))


def _sections(report: Report, images: Mapping[str, Path]) -> Iterator[Section]:
    figures = {
        entry.stem: (
            entry,
            base64.b64encode(images[entry.stem].read_bytes()).decode() if entry.stem in images else None,
        )
        for entry in report.figures
    }
    tables = {name: table for name, table in report.tables.items() if not table.text.empty}
    names = (REMOVAL_STEM, *report.experiments, ABLATION_STEM)
    shown: set[str] = set()
    for name in names:
        stems = [name, *(name + suffix for suffix in EXPERIMENT_SUFFIXES if suffix)]
        stems += ["accuracy_vs_cost"] if name == ABLATION_STEM else []
        stems += _of_other_analyses(name, figures)
        found = tuple(figures[stem] for stem in stems if stem in figures)
        results = report.experiments.get(name)
        title = results.spec.title if results else found[0][0].title.partition(":")[0] if found else "Ablation"
        yield Section(name, title, found, tuple(tables[n] for n in (name, f"{name}_orderings") if n in tables))
        shown |= set(stems)
    for stem, (entry, image) in figures.items():
        if stem not in shown:
            others = _of_other_analyses(stem, figures)
            title = entry.title.partition(":")[0] if others else entry.title
            yield Section(f"figure-{stem}", title, ((entry, image), *(figures[other] for other in others)), ())
            shown |= {stem, *others}
    for name, title in _OTHER_TABLES.items():
        if name in tables:
            yield Section(f"table-{name}", title, (), (tables[name],))


def _of_other_analyses(stem: str, stems: Iterable[str]) -> list[str]:
    """Return the stems of the same probe's figures of other analyses, which share its section."""
    return [other for other in stems if other.startswith(f"{stem}{PROBE_SEPARATOR}")]
