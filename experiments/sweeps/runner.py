"""What becomes of a cell: it is done already, another process has it, it is run, or it fails and says why."""

from __future__ import annotations

import gc
import logging
import os
import time
import traceback
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from experiments.cell import Cell
from experiments.errors import EXPECTED, one_line
from experiments.provenance import provenance
from experiments.sweeps.distributed import _as_the_first, first, together
from experiments.sweeps.store import Standing, Store

log = logging.getLogger(__name__)


_ROOT = Path(__file__).resolve().parents[1]


def attempt(cell: Cell, record_all: bool) -> Standing:
    """Run a cell unless it is done, has failed before or is another process's, and say how it then stands.

    Of several processes that train together the first decides, holds the lock and writes.

    Args:
        record_all: Record whatever the cell raises. Otherwise what wrong input raises is left to the caller.

    Raises:
        ResultsError: if the results folder cannot be written.
    """
    store = Store(cell.config.results)
    with ExitStack() as held:
        settled = _claim(cell, store, held) if first() else None
        if together():
            settled = _as_the_first(settled, cell.config.device)
        if settled:
            return settled
        began, started = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.monotonic()
        log.info("%s (%s)", cell.label, cell.id)
        try:
            from experiments.run_cell import run_cell  # imports torch: a cell that is done does not wait for it

            record = run_cell(cell, store.work(cell.id))
        except Exception as error:
            if full := store.full(error):
                raise full from error
            if not first() or (isinstance(error, EXPECTED) and not record_all):
                raise
            record = _failure(cell, error)
            if together():  # the others wait for a step that never comes: all end here
                store.write(_timed(record, began, started))
                raise
        if not first():
            return Standing("running")
        assert record  # the first process always has one
        store.write(_timed(record, began, started))
        if record["status"] == "finished":
            store.clean(cell.id)
        else:
            log.error("%s failed: %s", cell.label, record["error"])
            gc.collect()  # the failed model's memory is the next cell's
        return Standing(record["status"], record)


def _claim(cell: Cell, store: Store, held: ExitStack) -> Standing | None:
    """How a cell stands that this process shall not run; None, with its lock held, for one that it shall."""
    if settled := _settled(cell, store):
        return settled
    store.prepare()
    if not held.enter_context(store.lock(cell.id)):
        return Standing("running", owner=store.standing(cell.id).owner)
    return _settled(cell, store)  # another may have ended it before this one had the lock


def _settled(cell: Cell, store: Store) -> Standing | None:
    standing = store.standing(cell.id)
    if standing.state == "finished":
        return standing
    record = standing.record
    return None if record is None or cell.config.retry_failed else Standing("failed", record)


def _failure(cell: Cell, error: Exception) -> dict[str, Any]:
    """The record of a cell that raised."""
    told = "".join(traceback.format_exception(error))
    return {
        "schema": 1,
        "id": cell.id,
        "experiment": cell.config.name,
        "name": cell.label,
        "status": "failed",
        "error": f"{type(error).__name__}: {one_line(error)}".rstrip(": "),
        "traceback": told.replace(f"{_ROOT}{os.sep}", ""),
        "config": cell.resolved,
        "provenance": provenance(),
    }


def _timed(record: dict[str, Any], began: str, started: float) -> dict[str, Any]:
    seconds = round(time.monotonic() - started, 1)
    return record | {"provenance": {"started": began, "seconds": seconds, **record["provenance"]}}
