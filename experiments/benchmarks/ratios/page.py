"""The table of ratios in the guide to performance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.benchmarks.ratios.comparison import read_ratios
from experiments.benchmarks.ratios.measurements import MEASUREMENTS
from experiments.markdown import markdown_table
from experiments.provenance import ROOT

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- ratios: made by make bench -->", "<!-- end of ratios -->"


def ratio_table(record: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a section for each measurement of a record: what was divided by what, command, machine, date and ratios."""
    sections = []
    for group, measured in record.items():
        where = (
            f"`{measured['command']}`: {measured['machine']}, {measured['date']}, torch {measured['torch']}, transformers "
            f"{measured['transformers']}; load average {measured['load']:.0f}."
        )
        ratios = [ratio for (name, _), ratio in read_ratios({group: measured}).items()]
        rows = [
            [name, f"{ratio.ratio:.3f}", f"{ratio.noise:.3f}", str(ratio.rounds)]
            for name, ratio in zip(measured["ratios"], ratios, strict=True)
        ]
        meaning = MEASUREMENTS[group].meaning
        table = markdown_table(["ratio", "median", "noise", "rounds"], rows, ["median", "noise", "rounds"])
        sections.append(f"**{meaning[0].upper()}{meaning[1:]}.** {where}\n\n{table}")
    return "\n\n".join(sections)


def replace_table(page: str, record: Mapping[str, Any]) -> str:
    """Return the page with the table of another record between its two marks.

    Raises:
        ValueError: If the page lacks a mark.
    """
    if BEGIN not in page or END not in page:
        raise ValueError(f"{PAGE.name}: lacks the mark '{BEGIN if BEGIN not in page else END}'; put both back")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{ratio_table(record)}\n\n{END}{rest.split(END)[1]}"
