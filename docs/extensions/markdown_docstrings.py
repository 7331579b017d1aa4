"""Reads the Markdown of docstrings: fenced blocks, [`links`] in brackets and plurals of `code`s."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx


def as_restructured_text(lines: list[str]) -> list[str]:
    """Return the lines of a docstring with their Markdown as reStructuredText.

    Fenced blocks become literal blocks. Docstrings of transformers' style put names in brackets: the brackets go.
    """
    result: list[str] = []
    fenced = False
    for line in lines:
        if line.strip().startswith("```"):
            indent = line[: len(line) - len(line.lstrip())]
            result += [""] if fenced else ["", f"{indent}::", ""]
            fenced = not fenced
        elif fenced:
            result.append(f"    {line}")
        elif line.lstrip().startswith((">>>", "...")):
            result.append(line)
        else:
            line = re.sub(r"\[(`[^`]+`)\](?!\()", r"\1", line)
            line = re.sub(r"(`[^`]+`)(?=\w)", r"\1\\ ", line)
            parts = re.split(r"(`[^`]*`)", line)
            result.append("".join(part if part.startswith("`") else part.replace("|", r"\|") for part in parts))
    return result


def process_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = as_restructured_text(lines)


def setup(app: Sphinx) -> dict[str, bool]:
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", process_docstring, priority=400)  # before napoleon reads the sections
    return {"parallel_read_safe": True, "parallel_write_safe": True}
