"""The page: one self-contained HTML file, or an inline frame in a notebook."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from probes.view.run_data import ViewRun

# In the order of their imports: the files become one module.
_MODULES = (
    "decode.js",
    "numbers.js",
    "palette.js",
    "state.js",
    "heat_map.js",
    "words.js",
    "layer_heads.js",
    "mass_line.js",
    "export.js",
    "main.js",
)
_FRAME_HEIGHT = 900  # pixels in a notebook


class AttentionView:
    """An interactive page over one run or several, of which one is shown, or two are compared.

    Jupyter shows it inline. The page has the image with a heat map, the words of the prompt and the answer to click,
    and the attention on the image by layer and head.

    Args:
        runs: The runs.
        title: Title of the page.

    Raises:
        ValueError: If there are no runs.

    Example:
        >>> from probes import record_attention
        >>> from probes.view import find_words
        >>> words = find_words(tokens, inputs["input_ids"], processor.tokenizer)
        >>> with torch.no_grad(), record_attention(model, tokens, words=words) as attention:
        ...     output = model(**inputs)
        >>> page = attention.view(images=[image]).save(folder / "page.html")
    """

    def __init__(self, runs: Sequence[ViewRun], title: str = "") -> None:
        if not runs:
            raise ValueError("runs: a page needs at least one run, found 0")
        self.runs = tuple(runs)
        self._given_title = title
        self.title = title or "Attention of " + " and ".join(dict.fromkeys(run.name for run in runs))

    def compare(self, other: AttentionView) -> AttentionView:
        """Return a page with the runs of both, to show beside each other, or their difference.

        It has the title that was given to this page, or else the one given to the other.

        Args:
            other: Another model, image or question, or the same model under an intervention.
        """
        return AttentionView([*self.runs, *other.runs], self._given_title or other._given_title)

    def html(self) -> str:
        """Return the page as HTML. It needs no network."""
        data = {"version": 1, "runs": [run.data() for run in self.runs]}
        facts = dict.fromkeys(", ".join(run.model.values()) for run in self.runs)
        parts = {
            "title": html.escape(self.title),
            "style": _static("view.css"),
            "script": _script(),
            # "</script>" inside a string would end the element.
            "data": json.dumps(data, allow_nan=False, ensure_ascii=False).replace("</", "<\\/"),
            "generated": html.escape("; ".join(facts)),
        }
        return re.sub(r"{{ (\w+) }}", lambda found: parts[found[1]], _static("page.html"))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to a file, and return its path.

        The file appears whole: it is written under another name first.

        Args:
            path: The file, in a folder that exists.

        Raises:
            OSError: If the file cannot be written.
        """
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_text(self.html(), encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    def _repr_html_(self) -> str:
        source = html.escape(self.html(), quote=True)
        return (
            f'<iframe srcdoc="{source}" title="{html.escape(self.title, quote=True)}" '
            f'style="width: 100%; height: {_FRAME_HEIGHT}px; border: 0"></iframe>'
        )


@cache
def _static(name: str) -> str:
    return (files("probes.view") / "static" / name).read_text(encoding="utf-8")


@cache
def _script() -> str:
    """Return the modules as one: without imports of each other, and without the word export."""
    texts = (re.sub(r"^import [^;]*;\n", "", _static(name), flags=re.MULTILINE) for name in _MODULES)
    return "\n".join(re.sub(r"^export ", "", text, flags=re.MULTILINE) for text in texts)


def page_data(page: str) -> Any:
    """Return the data of a page's HTML."""
    found = re.search(r'<script type="application/json" id="view-data">(.*?)</script>', page, re.DOTALL)
    if found is None:
        raise ValueError("page: holds no recorded attention; pass the HTML of an AttentionView")
    return json.loads(found[1])
