"""Execute the notebooks and keep their outputs: `make notebooks`, or `python notebooks/execute.py [NAME ...]`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
TIMEOUT = 900  # seconds of one cell


def execute(book: NotebookNode, folder: Path) -> None:
    """Execute a notebook in place, in a kernel of its own.

    Args:
        book: The notebook.
        folder: The working directory of its kernel.
    """
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(book, timeout=TIMEOUT, resources=resources, record_timing=False).execute()
    tidy(book)


def tidy(book: NotebookNode) -> None:
    """Leave out what differs between two runs: progress bars and warnings on stderr, and how printed text was cut.

    Images that a kernel sends in two formats stay as PNG.
    """
    for cell in book.cells:
        if cell.cell_type != "code":
            continue
        outputs: list[NotebookNode] = []
        for output in cell.outputs:
            if output.output_type == "stream":
                if output.name == "stderr":
                    continue
                if outputs and outputs[-1].output_type == "stream":
                    outputs[-1].text += output.text
                    continue
            elif "image/png" in output.get("data", {}):
                output.data.pop("image/jpeg", None)
            outputs.append(output)
        cell.outputs = outputs
    book.metadata.language_info = {"name": "python"}


def main(names: list[str]) -> None:
    """Execute the named notebooks, by default all, and write them with their outputs."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        book = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            execute(book, Path(folder))
        nbformat.write(book, path)
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
