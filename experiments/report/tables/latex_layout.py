"""Layout of a LaTeX table: type size, column widths, panels and pages, so that it is set at 7 pt or more."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font, LoadFlags

TEXT_WIDTH, TEXT_HEIGHT = 345.0, 530.0
"""Width and height in pt of a page's text in LaTeX's article class, which other classes reach or exceed."""
GAP = 8.0
"""Space in pt that a column adds to its text: twice LaTeX's tabcolsep."""
_MOST_LINES = 3
_RULES, _SKIP = 16.0, 3.0  # pt: the three rules of a panel, and the space above a note
# Widths in em of what LaTeX sets in mathematics, which are wider than the text font's.
_SYMBOLS = dict.fromkeys("\u2212\u00d7<>\u2264\u2265\u2248\u2260", 0.78) | {"\u2192": 1.0, "_": 0.36}
_UNKNOWN_SYMBOL = 0.8
_BREAK_AFTER = re.compile(r"(?<=[._=/:,+])(?=.)")


@dataclass(frozen=True)
class TypeSize:
    """A type size of a document in 10 pt.

    Args:
        command: Its LaTeX command.
        points: Height of the type in pt.
        baseline: Distance of two lines in pt.
        stretch: Width of its letters relative to that of 10 pt type scaled down.
    """

    command: str
    points: float
    baseline: float
    stretch: float


NORMAL, FOOTNOTE, SCRIPT = (
    TypeSize("normalsize", 10, 12, 1.0),
    TypeSize("footnotesize", 8, 9.5, 1.07),
    TypeSize("scriptsize", 7, 8, 1.15),
)


@dataclass(frozen=True)
class Panel:
    """Columns that are set side by side.

    Args:
        columns: Numbers of the columns.
        widths: Width of each column in pt.
        wraps: Whether each column breaks its cells into lines.
    """

    columns: tuple[int, ...]
    widths: tuple[float, ...]
    wraps: tuple[bool, ...]


@dataclass(frozen=True)
class Page:
    """What one page of a table holds.

    Args:
        rows: Numbers of its rows.
        notes: Numbers of its notes.
    """

    rows: range
    notes: range


@dataclass(frozen=True)
class Layout:
    """A table on paper.

    Args:
        size: Type size of the cells.
        rotated: Whether the table lies on its side, as wide as the page is high.
        panels: Groups of columns, set below each other.
        pages: Rows and notes page by page.
    """

    size: TypeSize
    rotated: bool
    panels: tuple[Panel, ...]
    pages: tuple[Page, ...]


def lay_out(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str, notes: Sequence[str]) -> Layout:
    """Choose the first layout that fits: upright, at 8 or 7 pt, with wrapped cells, rotated, in panels.

    Args:
        header: Headings of the columns.
        rows: Texts of the cells, one for each column.
        caption: Text of the caption.
        notes: Paragraphs below the table.
    """
    cells = [header, *rows]
    for rotated, size, wrap in (
        (False, FOOTNOTE, False),
        (False, SCRIPT, False),
        (False, SCRIPT, True),
        (True, SCRIPT, False),
        (True, SCRIPT, True),
    ):
        width = TEXT_HEIGHT if rotated else TEXT_WIDTH
        panel = _fit_panel(cells, range(len(header)), size, width, wrap)
        if panel is not None:
            return Layout(size, rotated, (panel,), _paginate(cells, (panel,), size, rotated, caption, notes))
    panels = tuple(_split_columns(cells, SCRIPT, TEXT_HEIGHT))
    return Layout(SCRIPT, True, panels, _paginate(cells, panels, SCRIPT, True, caption, notes))


def pieces(word: str, width: float, size: TypeSize) -> list[str]:
    """Return the parts between which a line may break in a word that is wider than its column.

    Args:
        word: The word.
        width: Width of the column in pt.
        size: Type size.
    """
    if text_width(word, size) <= width:
        return [word]
    parts: list[str] = []
    for part in _BREAK_AFTER.split(word):
        parts += [part] if text_width(part, size) <= width else list(part)
    return parts


def words(text: str) -> list[str]:
    """Split a text at its spaces, except those in an interval: "83.1 [81.0, 85.2]" has two words."""
    return re.findall(r"\[[^\[\]]*\]\S*|\S+", text)


def text_width(text: str, size: TypeSize) -> float:
    """Return the width of a text in pt, in the widest font in use: Computer Modern."""
    return size.points * size.stretch * sum(map(_character_width, text))


@functools.cache
def _character_width(character: str) -> float:
    """Return the width of a character in em."""
    if character in _SYMBOLS:
        return _SYMBOLS[character]
    font = _font()
    if not font.get_char_index(ord(character)):
        return _UNKNOWN_SYMBOL
    return font.load_char(ord(character), flags=LoadFlags.NO_HINTING).linearHoriAdvance / 65536 / 10


@functools.cache
def _font() -> FT2Font:
    font = FT2Font(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "cmr10.ttf"))
    font.set_size(10, 72)
    return font


def _fit_panel(
    cells: Sequence[Sequence[str]], columns: Sequence[int], size: TypeSize, width: float, wrap: bool
) -> Panel | None:
    """Return columns side by side within a width, None if they do not fit."""
    available = width - GAP * len(columns)
    natural = [max(text_width(row[column], size) for row in cells) for column in columns]
    if sum(natural) <= available:
        return Panel(tuple(columns), tuple(natural), (False,) * len(columns))
    if not wrap:
        return None
    least = [_least_width(cells, column, size, n) for column, n in zip(columns, natural, strict=True)]
    if sum(least) > available:
        return None
    limit = _width_limit(natural, least, available)
    widths = [max(small, min(n, limit)) for small, n in zip(least, natural, strict=True)]
    return Panel(tuple(columns), tuple(widths), tuple(w < n for w, n in zip(widths, natural, strict=True)))


def _least_width(cells: Sequence[Sequence[str]], column: int, size: TypeSize, natural: float) -> float:
    """Return the smallest width at which a column can be read: few lines, and no broken word unless it is very long."""
    longest = max((text_width(word, size) for row in cells for word in words(row[column])), default=0.0)
    return min(max(min(longest, TEXT_WIDTH / 4), natural / _MOST_LINES), TEXT_WIDTH / 2)


def _width_limit(natural: Sequence[float], least: Sequence[float], available: float) -> float:
    """Return the width to which wide columns are cut so that all fit, by bisection."""
    low, high = 0.0, max(natural)
    for _ in range(40):
        middle = (low + high) / 2
        total = sum(max(small, min(n, middle)) for small, n in zip(least, natural, strict=True))
        low, high = (middle, high) if total <= available else (low, middle)
    return low


def _split_columns(cells: Sequence[Sequence[str]], size: TypeSize, width: float) -> Iterator[Panel]:
    """Yield panels that fit a width. Each repeats the first column."""
    chosen, fitting = [0], None
    for column in range(1, len(cells[0])):
        panel = _fit_panel(cells, [*chosen, column], size, width, wrap=True)
        if panel is None:
            assert fitting is not None  # two columns always fit, because neither needs more than half an upright page
            yield fitting
            chosen = [0]
            panel = _fit_panel(cells, [0, column], size, width, wrap=True)
        chosen.append(column)
        fitting = panel
    if fitting is None:  # a single column
        fitting = Panel((0,), (width - GAP,), (True,))
    yield fitting


def _paginate(
    cells: Sequence[Sequence[str]],
    panels: Sequence[Panel],
    size: TypeSize,
    rotated: bool,
    caption: str,
    notes: Sequence[str],
) -> tuple[Page, ...]:
    width, height = (TEXT_HEIGHT, TEXT_WIDTH) if rotated else (TEXT_WIDTH, TEXT_HEIGHT)
    row_heights = [sum(_row_lines(row, panel, size) for panel in panels) * size.baseline for row in cells]
    frame = row_heights[0] + _RULES * len(panels)
    note_heights = [_lines([note], width, FOOTNOTE) * FOOTNOTE.baseline + _SKIP for note in notes]
    used = 2 * NORMAL.baseline + _lines([caption], width, NORMAL) * NORMAL.baseline + frame
    pages, first_row, first_note = [], 0, 0
    for number, row_height in enumerate(row_heights[1:]):
        if used + row_height > height and number > first_row:
            pages.append(Page(range(first_row, number), range(0)))
            first_row, used = number, 2 * NORMAL.baseline + frame
        used += row_height
    rows = range(first_row, len(cells) - 1)
    for number, note_height in enumerate(note_heights):
        if used + note_height > height and (len(rows) or number > first_note):
            pages.append(Page(rows, range(first_note, number)))
            rows, first_note, used = range(0), number, 2 * NORMAL.baseline
        used += note_height
    return (*pages, Page(rows, range(first_note, len(notes))))


def _row_lines(row: Sequence[str], panel: Panel, size: TypeSize) -> int:
    return max(
        _lines([row[column]], width, size) if wrap else 1
        for column, width, wrap in zip(panel.columns, panel.widths, panel.wraps, strict=True)
    )


def _lines(texts: Sequence[str], width: float, size: TypeSize) -> int:
    """Return how many lines paragraphs take when their words are set one after the other."""
    total = 0
    for text in texts:
        lines, used, space = 1, 0.0, text_width(" ", size)
        for word in words(text):
            for index, piece in enumerate(pieces(word, width, size)):
                wanted = text_width(piece, size) + (space if index == 0 and used else 0)
                if used and used + wanted > width:
                    lines, used = lines + 1, text_width(piece, size)
                else:
                    used += wanted
        total += lines
    return max(math.ceil(total), 1)
