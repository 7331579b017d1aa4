"""Iteration in which a thread prepares the next item while the current one is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


@contextmanager
def read_ahead(items: Iterable[Item]) -> Iterator[Iterator[Item]]:
    """Iterate over items, with a thread that prepares one item ahead.

    Decoding, resizing and normalising frames leave Python's lock most of the time, so they run beside the model. At most
    two items exist at once: the one in use and the next.

    Args:
        items: All of its items are prepared in one thread, which ends with the block.

    Yields:
        The iterator. An error while an item is prepared is raised where that item would have come.

    Example:
        >>> from llava_mini.read_ahead import read_ahead
        >>> with read_ahead(range(3)) as numbers:
        ...     list(numbers)
        [0, 1, 2]
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read_ahead") as thread:
        yield _iterate(thread, iter(items))


def _iterate(thread: ThreadPoolExecutor, iterator: Iterator[Item]) -> Iterator[Item]:
    end = object()
    upcoming = thread.submit(next, iterator, end)
    while (item := upcoming.result()) is not end:
        upcoming = thread.submit(next, iterator, end)
        yield item  # type: ignore[misc]
        del item  # the next one may be waited for


__all__ = ["read_ahead"]
