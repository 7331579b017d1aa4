"""A table as Markdown, LaTeX (booktabs) and CSV text."""

from __future__ import annotations

import re
from collections.abc import Callable

from experiments.report.tables.table import Table

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\u2212": r"$-$",
    "\u2192": r"$\to$",
    "\u00d7": r"$\times$",
}


def markdown(table: Table) -> str:
    """GitHub-flavoured Markdown: caption, table, notes."""
    columns = list(table.text.columns)
    rule = ["---:" if column in table.numeric else "---" for column in columns]
    rows = _cells(table, _markdown_cell, "**{}**")
    lines = [f"| {' | '.join(row)} |" for row in (columns, rule, *rows)]
    return "\n".join([f"**{table.caption}**", "", *lines, *(f"\n{note}" for note in table.notes)]) + "\n"


def latex(table: Table) -> str:
    r"""A `table` environment with booktabs rules, to be \input as it is. Needs the packages booktabs
    and graphicx, which shrinks a table wider than the line."""
    columns = "".join("r" if column in table.numeric else "l" for column in table.text.columns)
    rows = _cells(table, escape, r"\textbf{{{}}}")
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            r"\footnotesize",
            r"\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{escape(table.caption)}}}",
            rf"\label{{tab:{table.name.replace('_', '-')}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(escape(column) for column in table.text.columns) + r" \\",
            r"\midrule",
            # A row that opens with "[" would be read as the optional length of the \\ before it.
            *(("{}" if row[0].startswith("[") else "") + " & ".join(row) + r" \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}}",
            *(rf"\par\smallskip\raggedright {escape(note)}" for note in table.notes),
            r"\end{table}",
            "",
        ]
    )


def csv(table: Table) -> str:
    """The plain numbers, comma-separated; accuracies from 0 to 1, six significant digits; empty where undefined."""
    return table.data.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def escape(text: str) -> str:
    """Text with every character that LaTeX treats specially written out."""
    return re.sub("|".join(map(re.escape, _LATEX)), lambda match: _LATEX[match.group()], text)


def _cells(table: Table, write: Callable[[str], str], bold: str) -> list[list[str]]:
    columns = list(table.text.columns)
    rows = enumerate(table.text.itertuples(index=False, name=None))
    return [
        [
            bold.format(write(cell)) if (i, column) in table.bold else write(cell)
            for column, cell in zip(columns, row, strict=True)
        ]
        for i, row in rows
    ]


def _markdown_cell(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|")
