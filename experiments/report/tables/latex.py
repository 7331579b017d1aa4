r"""LaTeX text of a table: booktabs rules, at 7 pt or more, on as many pages as it needs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from experiments.report.tables.latex_layout import FOOTNOTE, TEXT_WIDTH, Layout, Page, Panel, lay_out, pieces, words
from experiments.report.tables.table import NO_ROWS, Table

_ESCAPES = {
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
    "\u2264": r"$\le$",
    "\u2265": r"$\ge$",
    "\u2248": r"$\approx$",
    "\u2260": r"$\ne$",
}
_NUMBER = re.compile(r"^(?:table|tab\.|figure|fig\.)\s*[a-z]?\d+[a-z]?\s*[:.\u2013\u2014-]\s+", re.IGNORECASE)
_NAMED_TABLE = re.compile(r"^table\s*[a-z]?\d", re.IGNORECASE)


def latex(table: Table) -> str:
    r"""Return a table as LaTeX `table*` environments with booktabs rules, ready for \input.

    It needs the packages booktabs and graphicx. The type is 8 or 7 pt in a document of 10 pt. A table that is too wide
    for that wraps its cells, then lies on its side, then is set in panels that repeat the first column. A table longer
    than a page continues on the next one.

    Args:
        table: The table; without rows, the environment says so.
    """
    header, rows = list(table.text.columns), [list(row) for row in table.text.itertuples(index=False, name=None)]
    if not header:
        header, rows = [NO_ROWS], []
    caption = _without_number(table.caption)
    layout = lay_out(header, rows, caption, table.notes)
    parts = []
    for number, page in enumerate(layout.pages):
        parts += [r"\begin{table*}"]
        if layout.rotated:
            parts += [r"\centering", r"\rotatebox{90}{\begin{minipage}{\textheight}"]
        parts += [r"\centering", r"\footnotesize", r"\setlength{\tabcolsep}{4pt}"]
        if number == 0:
            parts += [rf"\caption{{{escape(caption)}}}", rf"\label{{tab:{table.name.replace('_', '-')}}}"]
        else:
            parts += [r"{\normalsize Table~\thetable{} (continued)\par}\smallskip"]
        if page.rows or number == 0:
            parts += _tabulars(table, layout, page, header, rows)
        parts += (rf"\par\smallskip\raggedright {_note(table.notes[i])}" for i in page.notes)
        if layout.rotated:
            parts += [r"\end{minipage}}"]
        parts += [r"\end{table*}"]
    return "\n".join([*parts, ""])


def escape(text: str) -> str:
    """Escape every character that is special in LaTeX."""
    return re.sub("|".join(map(re.escape, _ESCAPES)), lambda match: _ESCAPES[match.group()], text)


def _without_number(caption: str) -> str:
    """Keep a caption from starting with a table's number, because LaTeX numbers tables itself.

    "Table 6: the effect" becomes "The effect", and "Table 10 at equal FLOPs" "Rows of Table 10 at equal FLOPs".
    """
    text = _NUMBER.sub("", caption)
    if _NAMED_TABLE.match(text):
        return f"Rows of {text}"
    return text[:1].upper() + text[1:]


def _tabulars(
    table: Table, layout: Layout, page: Page, header: Sequence[str], rows: Sequence[Sequence[str]]
) -> Iterator[str]:
    """Yield the lines of a page's panels."""
    for number, panel in enumerate(layout.panels):
        if number:
            yield r"\par\medskip"
        if layout.size != FOOTNOTE:
            yield rf"{{\{layout.size.command}"
        yield rf"\begin{{tabular}}{{{''.join('r' if header[c] in table.numeric else 'l' for c in panel.columns)}}}"
        yield r"\toprule"
        yield _row(layout, panel, table, header, header, bold=())
        yield r"\midrule"
        for index in page.rows:
            bold = [column for row, column in table.bold if row == index]
            yield _row(layout, panel, table, header, rows[index], bold)
        yield r"\bottomrule"
        yield r"\end{tabular}" if layout.size == FOOTNOTE else r"\end{tabular}}"


def _row(
    layout: Layout, panel: Panel, table: Table, header: Sequence[str], row: Sequence[str], bold: Sequence[str]
) -> str:
    cells = []
    for column, width, wraps in zip(panel.columns, panel.widths, panel.wraps, strict=True):
        text = _wrapped(row[column], width, layout) if wraps else escape(row[column])
        if header[column] in bold:
            text = rf"\textbf{{{text}}}"
        if wraps:
            side = r"\raggedleft" if header[column] in table.numeric else r"\raggedright"
            text = rf"\parbox[t]{{{width:.1f}pt}}{{{side}\strut {text}\strut}}"
        cells.append(text)
    # LaTeX would read a "[" at the start of a row as the optional length of the preceding \\.
    return ("{}" if cells[0].startswith("[") else "") + " & ".join(cells) + r" \\"


def _wrapped(text: str, width: float, layout: Layout) -> str:
    """Return a text whose lines may break at spaces outside intervals, and inside a word only if it is too long."""
    return " ".join(
        r"\allowbreak{}".join(escape(piece).replace(" ", "~") for piece in pieces(word, width, layout.size))
        for word in words(text)
    )


def _note(note: str) -> str:
    """Return a paragraph in which a very long word, such as a path, may break."""
    return " ".join(r"\allowbreak{}".join(map(escape, pieces(word, TEXT_WIDTH / 2, FOOTNOTE))) for word in note.split())
