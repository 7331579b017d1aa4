"""Write the report of a results folder: tables, figures and one HTML page."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.records.files import Records
from experiments.report.build import write_report
from experiments.report.request import split_results
from experiments.report.results import load


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m experiments.report`.

    Args:
        argv: Command-line arguments, those of the process by default.

    Returns:
        The exit status: 1 if the request selects nothing or the folder cannot be written.
    """
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__)
    parser.add_argument(
        "--results", type=Path, help="folder that holds records/ (default: results); results=FOLDER is the same"
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="folder to write to (default: report in the folder of results)"
    )
    parser.add_argument(
        "request",
        nargs="*",
        metavar="KEY=VALUE",
        help="results=FOLDER names the folder, as for experiments.run; experiment=NAME,... limits the report to these "
        "tables; other settings, such as train.max_steps=60, select among their records",
    )
    arguments = parser.parse_args(argv)
    try:
        results, words = split_results(arguments.request, arguments.results)
        report = load(results, *words)
        _warn_unreadable(report.records)
        write_report(report, arguments.out or results / "report")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _warn_unreadable(records: Records) -> None:
    if records.unreadable:
        files = "; ".join(f"{entry.name}: {entry.reason}" for entry in records.unreadable)
        print(f"warning: {len(records.unreadable)} record(s) left out: {files}", file=sys.stderr)


if __name__ == "__main__":
    gc.disable()  # the process ends soon, so collecting garbage costs more time than it saves memory
    sys.exit(main())
