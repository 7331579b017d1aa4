"""The HTML page: one file that needs no network and no script."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2

from experiments.records.files import Records
from experiments.records.views import describe
from experiments.report.captions import COST, Drawing
from experiments.report.experiment_results import Study
from experiments.report.tables.table import Table
from experiments.report.verdict import CLAIM, RULE, Headline, Verdict


def render(
    records: Records,
    headline: Headline,
    verdicts: Sequence[Verdict],
    studies: Sequence[Study],
    tables: Sequence[Table],
    drawings: Sequence[Drawing],
    pictures: Mapping[str, Path],
) -> str:
    """The page as HTML text: each study with its figures and tables, then the other figures and tables.

    `pictures` maps the stem of every figure drawn to its PNG, which is embedded.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    uris = {stem: base64.b64encode(path.read_bytes()).decode() for stem, path in pictures.items()}
    drawn = {drawing.stem: (drawing, uris.get(drawing.stem)) for drawing in drawings}
    of_studies = {study.name + end for study in studies for end in ("", COST)}
    return environment.get_template("page.html.j2").render(
        claim=CLAIM,
        rule=RULE,
        headline=headline,
        verdicts=verdicts,
        studies=[study.name for study in studies],
        tables={table.name: table for table in tables},
        figures=drawn,
        others=[shown for stem, shown in drawn.items() if stem not in of_studies],
        cost=COST,
        records=records,
        describe=describe,
    )
