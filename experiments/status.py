"""How the cells of a sweep stand: `python -m experiments.status experiment=table6_prefusion seed=0,1,2`, with the
overrides of the sweep. Without any but `results=FOLDER`, all records and locks of the results folder."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.config import registry, schema
from experiments.errors import EXPECTED, stop
from experiments.records.files import read
from experiments.records.views import describe, failure
from experiments.sweeps import hydra_api, plan
from experiments.sweeps.launch import count, standings, states
from experiments.sweeps.store import Standing, Store

_RESULTS = "results="
_STYLES = {"finished": "green", "failed": "red", "running": "yellow", "missing": "dim", "unreadable": "red"}


@dataclass(frozen=True)
class Line:
    """One cell of the table shown: `seconds` it took, or has taken up to now."""

    experiment: str
    name: str
    state: str
    seconds: float | None
    note: str


def main(argv: Sequence[str] | None = None) -> int:
    """Show how cells stand. Returns the exit status, 0; wrong input ends the program with one line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.status", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="as for `python -m experiments.run -m`")
    overrides = parser.parse_args(argv).overrides
    registry.register()
    try:
        lines = _of_a_sweep(overrides) if any(not o.startswith(_RESULTS) for o in overrides) else _of_all(overrides)
    except EXPECTED as error:
        stop(error)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(_table(lines))
    console.print(summary(lines), highlight=False)
    return 0


def _of_a_sweep(overrides: Sequence[str]) -> list[Line]:
    with hydra_api.hydra() as hydra:
        _, jobs = plan.expand(hydra, overrides)
    found = standings(jobs)
    named = {job.cell.id: (job.cell.config.name, job.name) for job in jobs if job.cell}
    return [_line(*named[identity], standing) for identity, standing in found.items()]


def _of_all(overrides: Sequence[str]) -> list[Line]:
    folder = overrides[-1].removeprefix(_RESULTS) if overrides else schema.Config.results
    store = Store(folder)
    if not store.records.is_dir():
        raise FileNotFoundError(f"no records in '{store.records}': name another folder with {_RESULTS}FOLDER")
    return sorted(_stored(store), key=lambda line: (line.experiment, line.name))


def _stored(store: Store) -> Iterator[Line]:
    names = {path.stem for path in store.records.glob("*.json")}
    for name in sorted(names | set(store.locked())):
        standing = store.standing(name)
        record = standing.record
        if record or standing.state != "missing":
            yield _line(record["experiment"] if record else "", describe(record) if record else name, standing)
        elif name in names:
            try:
                read(store.path(name))
                reason = "its name is not that of its cell"
            except (OSError, ValueError) as error:
                reason = str(error)
            yield Line("", f"{name}.json", "unreadable", None, reason)


def _line(experiment: str, name: str, standing: Standing) -> Line:
    seconds, note = None, ""
    if standing.state == "running" and standing.owner:
        seconds, note = time.time() - standing.owner.since, str(standing.owner)
    elif standing.record:
        seconds = standing.record["provenance"].get("seconds")
        note = failure(standing.record).removeprefix("failed: ") if standing.state == "failed" else ""
    return Line(experiment, name, standing.state, seconds, note)


def summary(lines: Sequence[Line]) -> str:
    """How many cells are in which state, and how long the rest will take the processes that now run, or one."""
    text = f"{count(len(lines))}: {states([line.state for line in lines])}"
    took = [line.seconds for line in lines if line.state == "finished" and line.seconds is not None]
    running = [line.seconds or 0.0 for line in lines if line.state == "running"]
    missing = sum(line.state == "missing" for line in lines)
    if not took or not (running or missing):
        return text
    mean = sum(took) / len(took)
    left = missing * mean + sum(max(mean - seconds, 0.0) for seconds in running)
    processes = max(len(running), 1)
    return (
        f"{text}\n{_time(mean)} a cell; about {_time(left / processes)} left for "
        f"{processes} process{'es' * (processes > 1)}"
    )


def _table(lines: Sequence[Line]) -> Table:
    table = Table("experiment", "cell", "state", "time", "")
    for line in lines:
        state = f"[{_STYLES[line.state]}]{line.state}[/]"
        time_ = "" if line.seconds is None else _time(line.seconds)
        table.add_row(escape(line.experiment), escape(line.name), state, time_, escape(line.note))
    return table


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


if __name__ == "__main__":
    sys.exit(main())
