"""Run one cell, unless it is finished, failed before, or runs in another process."""

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
from experiments.errors import INPUT_ERRORS, HubError, MissingDeviceError, is_connection_error, one_line
from experiments.models.saved_models import SaveError, is_saved
from experiments.provenance import ROOT, provenance
from experiments.records.schema import SCHEMA
from experiments.sweeps.distributed import broadcast_status, is_distributed, is_main_process
from experiments.sweeps.store import CellStatus, RecordStore, ResultsFolderError

log = logging.getLogger(__name__)


def run_if_needed(cell: Cell, record_input_errors: bool) -> CellStatus:
    """Run a cell and write its record, unless that is done or another process does it.

    Of several processes that train together, the main process decides, holds the lock and writes.

    Args:
        cell: The cell.
        record_input_errors: Write a record of failure also for what wrong input raises. Otherwise such an error is
            raised.

    Returns:
        The status of the cell afterwards.

    Raises:
        ResultsFolderError: If the results folder cannot be written, or the record cannot be read back.
        SaveError: If the model cannot be saved.
        MissingDeviceError, ImportError, HubError: If this machine lacks a device or a package, or the network or the model
            hub fails. Such an error is not recorded.
    """
    store = RecordStore(cell.config.results)
    with ExitStack() as held_lock:
        status = _claim(cell, store, held_lock) if is_main_process() else None
        if is_distributed():
            status = broadcast_status(status, cell.config.device)
        if status:
            return status
        started, clock = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.monotonic()
        log.info("%s (%s)", cell.label, cell.id)
        try:
            from experiments.run_cell import run_cell  # imports torch, which a finished cell does not need

            record = run_cell(
                cell, store.work(cell.id), lambda record: store.write(_with_times(record, started, clock))
            )
        except (ImportError, MissingDeviceError, SaveError, ResultsFolderError):
            raise  # this machine lacks something, which is no result of the cell
        except Exception as error:
            if disk_full := store.disk_full_error(error):
                raise disk_full from error
            if is_connection_error(error):
                raise HubError(f"{one_line(error).rstrip('.')}; the same command tries again") from error
            if not is_main_process() or (isinstance(error, INPUT_ERRORS) and not record_input_errors):
                raise
            if store.status(cell.id).state == "finished":  # the record stays, and the error is of the saved model
                raise SaveError(f"save: the model was not saved: {type(error).__name__}: {one_line(error)}") from error
            record = _failure_record(cell, error)
            store.write(_with_times(record, started, clock))
            if is_distributed():  # the other processes wait for this one, so all must end
                raise
            log.error("%s failed: %s", cell.label, record["error"])
            gc.collect()  # the next cell needs the failed model's memory
            return CellStatus("failed", record)
        if not is_main_process():
            return CellStatus("running")
        finished = store.require_finished(cell.id)  # before its checkpoints go, from which it could be made again
        store.clean(cell.id)
        return CellStatus("finished", finished)


def _claim(cell: Cell, store: RecordStore, held_lock: ExitStack) -> CellStatus | None:
    """Take the lock of a cell that this process must run.

    Returns:
        None, with the lock held, or the status of a cell that must not be run here.
    """
    if status := _settled_status(cell, store):
        return status
    store.prepare()
    if not held_lock.enter_context(store.lock(cell.id)):
        return CellStatus("running", owner=store.status(cell.id).owner)
    return _settled_status(cell, store)  # another process may have ended it just before


def _settled_status(cell: Cell, store: RecordStore) -> CellStatus | None:
    """Return the status of a cell that needs no run, None for any other."""
    status = store.status(cell.id)
    if status.state == "finished":
        return None if lacks_saved_model(cell) else status
    record = status.record
    return None if record is None or cell.config.retry_failed else CellStatus("failed", record)


def lacks_saved_model(cell: Cell) -> bool:
    """Return whether a finished cell must run again because `save` names a folder that has not its model."""
    return cell.config.save is not None and not is_saved(Path(cell.config.save), cell.id)


def _failure_record(cell: Cell, error: Exception) -> dict[str, Any]:
    trace = "".join(traceback.format_exception(error))
    return {
        "schema": SCHEMA,
        "id": cell.id,
        "experiment": cell.config.name,
        "name": cell.label,
        "status": "failed",
        "error": f"{type(error).__name__}: {one_line(error)}".rstrip(": "),
        "traceback": trace.replace(f"{ROOT}{os.sep}", ""),
        "config": cell.resolved,
        "provenance": provenance(),
    }


def _with_times(record: dict[str, Any], started: str, clock: float) -> dict[str, Any]:
    seconds = round(time.monotonic() - clock, 1)
    return record | {"provenance": {"started": started, "seconds": seconds, **record["provenance"]}}
