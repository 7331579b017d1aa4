"""Writers of a table: Markdown, LaTeX (booktabs) and CSV text."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence

from experiments.report.tables.table import Table

_LATEX_ESCAPES = {
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
    """Return a table as GitHub-flavoured Markdown: caption, table, notes."""
    rows = _format_cells(table, _markdown_cell, "**{}**")
    lines = markdown_table(list(table.text.columns), rows, table.numeric)
    return "\n".join([f"**{table.caption}**", "", lines, *(f"\n{note}" for note in table.notes)]) + "\n"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], right_aligned: Collection[str]) -> str:
    """Return a Markdown table, without a newline at its end.

    Args:
        columns: Column headers.
        rows: A text for each column, row by row; special characters are not escaped.
        right_aligned: The headers of the columns that are aligned to the right.
    """
    rule = ["---:" if column in right_aligned else "---" for column in columns]
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, rule, *rows))


def latex(table: Table) -> str:
    r"""Return a table as a LaTeX `table` environment with booktabs rules, ready for \input.

    It needs the packages booktabs and graphicx; the latter shrinks a table that is wider than the line.
    """
    columns = "".join("r" if column in table.numeric else "l" for column in table.text.columns)
    rows = _format_cells(table, escape, r"\textbf{{{}}}")
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
            # LaTeX would read a "[" at the start of a row as the optional length of the preceding \\.
            *(("{}" if row[0].startswith("[") else "") + " & ".join(row) + r" \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}}",
            *(rf"\par\smallskip\raggedright {escape(note)}" for note in table.notes),
            r"\end{table}",
            "",
        ]
    )


def csv(table: Table) -> str:
    """Return a table's plain numbers as CSV: fractions with six significant digits, empty if undefined."""
    return table.data.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def escape(text: str) -> str:
    """Escape every character that is special in LaTeX."""
    return re.sub("|".join(map(re.escape, _LATEX_ESCAPES)), lambda match: _LATEX_ESCAPES[match.group()], text)


def _format_cells(table: Table, write: Callable[[str], str], bold: str) -> list[list[str]]:
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
