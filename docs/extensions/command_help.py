"""A directive that shows what `python -m MODULE --help` prints.

    ```{command-help} llava_mini.chat
    ```

The module runs in Sphinx's own process: a process for each command would import torch each time.
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
import warnings
from unittest import mock

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class CommandHelp(SphinxDirective):
    """Show a console block with the command and its help."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        try:
            text = f"$ python -m {self.arguments[0]} --help\n{help_of(self.arguments[0])}"
        except Exception as error:
            raise self.error(f"python -m {self.arguments[0]} --help: {type(error).__name__}: {error}") from error
        return [nodes.literal_block(text, text, language="text")]


def help_of(module: str) -> str:
    """Return what a module prints with `--help`, at 80 columns.

    Raises:
        RuntimeError: If it does not exit with status 0.
    """
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [module, "--help"]),
        mock.patch.dict(os.environ, COLUMNS="80", NO_COLOR="1"),
        contextlib.redirect_stdout(printed),
        warnings.catch_warnings(action="ignore"),
    ):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as leave:
            if leave.code:
                raise RuntimeError(f"exit status {leave.code}") from leave
    return printed.getvalue()


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
