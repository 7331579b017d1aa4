"""`python -m experiments.report`: every record found becomes tables, figures and one page."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.records.files import load
from experiments.report import request
from experiments.report.build import write


def main(argv: Sequence[str] | None = None) -> int:
    """Make the report. Returns the exit status: 1 if what was asked for is not there or the folder cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__)
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="folder that holds records/ (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=None, help="where the report goes (RESULTS/report)")
    parser.add_argument(
        "asked",
        nargs="*",
        metavar="KEY=VALUE",
        help="experiment=NAME,... reports on these tables alone; other settings choose among their cells: train.steps=60",
    )
    arguments = parser.parse_args(argv)
    out = arguments.out or arguments.results / "report"
    try:
        write(load(arguments.results / "records"), out, request.parse(arguments.asked))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    gc.disable()  # the program ends before what it would collect is worth the search
    sys.exit(main())
