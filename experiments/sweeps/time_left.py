"""An estimate of the time that a sweep still needs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta


def seconds_left(finished: Sequence[float], running: Sequence[float], missing: int, processes: int) -> float | None:
    """Return the seconds until all cells are finished, if each takes the mean time of those that are.

    Args:
        finished: Seconds that each finished cell took.
        running: Seconds that each running cell has run so far.
        missing: Number of cells that nobody has started.
        processes: Number of processes that run cells.

    Returns:
        The estimate, None if no cell is finished yet.

    Example:
        >>> seconds_left(finished=[50.0, 70.0], running=[20.0, 45.0], missing=3, processes=2)
        117.5
    """
    if not finished:
        return None
    mean = sum(finished) / len(finished)
    return (missing * mean + sum(max(mean - seconds, 0.0) for seconds in running)) / processes


def format_duration(seconds: float) -> str:
    """Return a duration in whole seconds: "0:01:30"."""
    return str(timedelta(seconds=round(seconds)))
