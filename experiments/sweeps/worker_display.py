"""What a sweep in several workers shows: one live table on a terminal, and a line for each job that ends.

On a terminal, a table at the bottom has a row for each worker. Elsewhere, as in a log file, only the lines are written.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from hydra.core.utils import JobReturn, JobStatus
from rich.console import Console
from rich.live import Live
from rich.table import Table

from experiments.errors import one_line
from experiments.sweeps.time_left import format_duration, seconds_left
from experiments.sweeps.worker import Progress

_REFRESHES = 4  # per second


class _Row:
    """What one worker does."""

    def __init__(self, name: str) -> None:
        self.name, self.started = name, time.monotonic()
        self.progress: Progress | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class WorkerDisplay:
    """Shows the jobs of all workers. A context manager: its table exists inside the block.

    Args:
        jobs: Number of jobs.
        console: Where to write; stderr by default.
    """

    def __init__(self, jobs: int, console: Console | None = None) -> None:
        self.jobs = jobs
        self.console = console or Console(stderr=True)
        self._rows: dict[int, _Row] = {}
        self._durations: list[float] = []
        self._live = Live(
            console=self.console, get_renderable=self.table, refresh_per_second=_REFRESHES, transient=True
        )

    def __enter__(self) -> WorkerDisplay:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def started(self, worker: int, name: str) -> None:
        """Show that a worker began a job."""
        self._rows[worker] = _Row(name)

    def progress(self, worker: int, progress: Progress) -> None:
        """Show how far a worker's job is."""
        self._rows[worker].progress = progress

    def finished(self, worker: int, name: str, result: JobReturn, lines: Sequence[str]) -> None:
        """Write what a job wrote, and a line with its end. The worker leaves the table until it starts another job."""
        seconds = self._rows.pop(worker).seconds
        self._durations.append(seconds)
        if result.status == JobStatus.FAILED:
            outcome = f"error: {one_line(result._return_value)}"
        elif isinstance(result._return_value, float):
            outcome = f"accuracy {result._return_value:.1%}"
        else:
            outcome = "ended"
        position = f"{len(self._durations)} of {self.jobs}"
        self.write([*lines, f"{position}: {name}: {outcome}, {format_duration(seconds)}"])

    def write(self, lines: Sequence[str]) -> None:
        """Write lines as they are, above the table."""
        for line in lines:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def table(self) -> Table:
        """Return the table: a row for each worker, and below it how many jobs have ended and the time left."""
        table = Table("cell", "stage", "step", "time", "left", caption=self._summary(), caption_justify="left")
        for row in list(self._rows.values()):  # rich draws in a thread of its own
            progress = row.progress
            stage = progress.stage if progress else "starting"
            table.add_row(row.name, stage, _step(progress), format_duration(row.seconds), self._left(row))
        return table

    def _left(self, row: _Row) -> str:
        """Return the time left of a job: by the jobs that ended, or else of its stage, by its rate."""
        left = seconds_left(self._durations, [row.seconds], 0, 1)
        progress = row.progress
        if left is None and progress and progress.total and progress.rate:
            left = (progress.total - progress.done) / progress.rate
        return "" if left is None else format_duration(left)

    def _summary(self) -> str:
        running = [row.seconds for row in list(self._rows.values())]
        ended = len(self._durations)
        waiting = max(self.jobs - ended - len(running), 0)
        left = seconds_left(self._durations, running, waiting, len(running)) if running else None
        return f"{ended} of {self.jobs} ended" + ("" if left is None else f"; about {format_duration(left)} left")


def _step(progress: Progress | None) -> str:
    if progress is None:
        return ""
    return f"{progress.done:g}" + (f" of {progress.total:g}" if progress.total else "")
