"""The live table of a sweep's workers, and the lines for ended jobs."""

import io

import pytest
from hydra.core.utils import JobReturn, JobStatus
from rich.console import Console

from experiments.sweeps import worker_display
from experiments.sweeps.time_left import seconds_left
from experiments.sweeps.worker import Progress
from experiments.sweeps.worker_display import WorkerDisplay


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until its entry is changed."""
    now = [100.0]
    monkeypatch.setattr(worker_display.time, "monotonic", lambda: now[0])
    return now


def text_of(display):
    """Return what the table of a display shows now, line by line."""
    console = Console(file=io.StringIO(), width=120)
    console.print(display.table())
    return console.file.getvalue().splitlines()


def ended(value):
    """Return what Hydra returns of a job that ended well."""
    return JobReturn(status=JobStatus.COMPLETED, _return_value=value)


def display_of(jobs, terminal=False):
    """Return a display that writes into a string."""
    return WorkerDisplay(jobs, Console(file=io.StringIO(), force_terminal=terminal, width=120))


def test_table_shows_cell_step_time_and_time_left_of_each_worker(clock):
    display = display_of(4)
    display.started(0, "seed=0")
    display.started(1, "seed=1")
    clock[0] += 30
    display.progress(0, Progress("training", 20, 60, 2.0))
    rows = text_of(display)
    (first,) = (row for row in rows if "seed=0" in row)
    assert [cell.strip() for cell in first.split("│")[1:6]] == ["seed=0", "training", "20 of 60", "0:00:30", "0:00:20"]
    (second,) = (row for row in rows if "seed=1" in row)
    assert "starting" in second
    assert any("0 of 4 ended" in row and "left" not in row for row in rows)


def test_table_estimates_the_time_left_from_the_jobs_that_ended(clock):
    display = display_of(5)
    for worker in (0, 1):
        display.started(worker, f"seed={worker}")
    clock[0] += 40
    display.finished(0, "seed=0", ended(0.5), [])
    display.started(0, "seed=2")
    clock[0] += 10
    expected = seconds_left([40], [10, 50], missing=2, processes=2)
    assert expected == (2 * 40 + 30 + 0) / 2
    rows = text_of(display)
    assert any("1 of 5 ended; about 0:00:55 left" in row for row in rows)
    assert "0:00:30" in next(row for row in rows if "seed=2" in row)


def test_table_leaves_out_a_worker_without_a_job(clock):
    display = display_of(1)
    display.started(0, "seed=0")
    display.finished(0, "seed=0", ended(None), [])
    rows = text_of(display)
    assert not any("seed=0" in row for row in rows)
    assert rows[-1].strip() == "1 of 1 ended"


def test_display_in_a_log_file_writes_one_line_for_each_job_and_no_table(clock):
    with display_of(2) as display:
        for seed, value in ((0, 0.625), (1, None)):
            display.started(0, f"seed={seed}")
            clock[0] += 61
            display.finished(0, f"seed={seed}", ended(value), [])
    assert display.console.file.getvalue().splitlines() == [
        "1 of 2: seed=0: accuracy 62.5%, 0:01:01",
        "2 of 2: seed=1: ended, 0:01:01",
    ]


def test_display_writes_lines_as_they_are(clock):
    line = "a [bold]word[/bold] " + "x" * 300
    with display_of(1) as display:
        display.started(0, "[0]")
        display.finished(0, "[0]", JobReturn(status=JobStatus.FAILED, _return_value=ValueError("a\nb")), [line])
    assert display.console.file.getvalue().splitlines() == [line, "1 of 1: [0]: error: a b, 0:00:00"]


def test_display_on_a_terminal_draws_the_table_and_removes_it():
    with display_of(3, terminal=True) as display:
        display.started(0, "seed=0")
        display._live.refresh()
        drawn = display.console.file.getvalue()
        assert "seed=0" in drawn
        assert "0 of 3 ended" in drawn
    assert display.console.file.getvalue().endswith("\x1b[2K")  # the last line is erased
