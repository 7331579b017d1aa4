"""Show the status of a sweep's cells: `python -m experiments.status experiment=table6_prefusion seed=0,1,2`, with the
overrides of the sweep. Without overrides other than `results=FOLDER`, show all records and locks of that folder."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.config.registry import register_configs
from experiments.errors import INPUT_ERRORS, exit_with_error
from experiments.records.files import read_record
from experiments.records.views import failure_reason, record_label
from experiments.report.request import split_results
from experiments.sweeps.hydra_api import ConfigSource, open_hydra
from experiments.sweeps.launch import cell_statuses, count_cells, summarise_states
from experiments.sweeps.plan import expand_sweep
from experiments.sweeps.store import CellStatus, RecordStore
from experiments.sweeps.time_left import format_duration, seconds_left

_STYLES = {"finished": "green", "failed": "red", "running": "yellow", "missing": "dim", "unreadable": "red"}


@dataclass(frozen=True)
class StatusLine:
    """One line of the table.

    Attributes:
        experiment: The experiment of the cell, "" if it is not known.
        name: The cell's name.
        state: Its state, or "unreadable".
        seconds: How long it took, or has run so far.
        note: The owner of a running cell, or the reason of a failure.
    """

    experiment: str
    name: str
    state: str
    seconds: float | None
    note: str


def main(argv: Sequence[str] | None = None) -> int:
    """Show the status of cells.

    Returns:
        The exit status, 0. Wrong input ends the program with one line.
    """
    parser = argparse.ArgumentParser(prog="python -m experiments.status", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="as for `python -m experiments.run -m`")
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="changes nothing: all cells of the sweep are shown"
    )
    parser.add_argument("-cd", "--config-dir", help="folder of your own configuration files, as for the run")
    arguments = parser.parse_intermixed_args(argv)
    overrides, source = arguments.overrides, ConfigSource(config_dir=arguments.config_dir)
    register_configs()
    try:
        results, others = split_results(overrides, None)
        lines = _sweep_lines(overrides, source) if others else _all_lines(results)
    except INPUT_ERRORS as error:
        exit_with_error(error)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(_table(lines))
    console.print(summary(lines), highlight=False)
    return 0


def summary(lines: Sequence[StatusLine]) -> str:
    """Return how many cells are in each state, and the time left for the processes that run now, or for one."""
    text = f"{count_cells(len(lines))}: {summarise_states([line.state for line in lines])}"
    durations = [line.seconds for line in lines if line.state == "finished" and line.seconds is not None]
    running = [line.seconds or 0.0 for line in lines if line.state == "running"]
    missing = sum(line.state == "missing" for line in lines)
    if not durations or not (running or missing):
        return text
    processes = max(len(running), 1)
    left = seconds_left(durations, running, missing, processes)
    assert left is not None
    return (
        f"{text}\n{format_duration(sum(durations) / len(durations))} a cell; about {format_duration(left)} left for "
        f"{processes} process{'es' * (processes > 1)}"
    )


def _sweep_lines(overrides: Sequence[str], source: ConfigSource) -> list[StatusLine]:
    with open_hydra(source) as hydra:
        _, jobs = expand_sweep(hydra, overrides)
    names = {job.cell.id: (job.cell.config.name, job.name) for job in jobs if job.cell}
    return [_line(*names[identity], status) for identity, status in cell_statuses(jobs).items()]


def _all_lines(results: Path) -> list[StatusLine]:
    store = RecordStore(results)
    if not store.records.is_dir():
        raise FileNotFoundError(f"no records in '{store.records}': name another folder with results=FOLDER")
    return sorted(_stored_lines(store), key=lambda line: (line.experiment, line.name))


def _stored_lines(store: RecordStore) -> Iterator[StatusLine]:
    recorded = {path.stem for path in store.records.glob("*.json")}
    for identity in sorted(recorded | set(store.locked())):
        status = store.status(identity)
        record = status.record
        if record or status.state != "missing":
            yield _line(record["experiment"] if record else "", record_label(record) if record else identity, status)
        elif identity in recorded:
            try:
                read_record(store.path(identity))
                reason = "its name is not the identity of its cell"
            except (OSError, ValueError) as error:
                reason = str(error)
            yield StatusLine("", f"{identity}.json", "unreadable", None, reason)


def _line(experiment: str, name: str, status: CellStatus) -> StatusLine:
    seconds, note = None, ""
    if status.state == "running" and status.owner:
        seconds, note = time.time() - status.owner.since, str(status.owner)
    elif status.record:
        seconds = status.record["provenance"].get("seconds")
        note = failure_reason(status.record).removeprefix("failed: ") if status.state == "failed" else ""
    return StatusLine(experiment, name, status.state, seconds, note)


def _table(lines: Sequence[StatusLine]) -> Table:
    table = Table("experiment", "cell", "state", "time", "")
    for line in lines:
        state = f"[{_STYLES[line.state]}]{line.state}[/]"
        duration = "" if line.seconds is None else format_duration(line.seconds)
        table.add_row(escape(line.experiment), escape(line.name), state, duration, escape(line.note))
    return table


if __name__ == "__main__":
    sys.exit(main())
