"""Markdown tables."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], right_aligned: Collection[str] = ()) -> str:
    r"""Return a Markdown table, without a newline at its end.

    Args:
        columns: Column headers.
        rows: A text for each column, row by row. Special characters are not escaped (`markdown_cell`).
        right_aligned: The headers of the columns that are aligned to the right.

    Example:
        >>> print(markdown_table(["row", "n"], [["a", "12"]], ["n"]))
        | row | n |
        | --- | ---: |
        | a | 12 |
    """
    rule = ["---:" if column in right_aligned else "---" for column in columns]
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, rule, *rows))


def markdown_cell(text: str) -> str:
    """Return a text with the characters escaped that would end a cell."""
    return text.replace("\\", "\\\\").replace("|", "\\|")
