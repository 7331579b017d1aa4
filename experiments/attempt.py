"""What becomes of a cell: it is done already, another process has it, it is run, or it fails and says why."""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
import traceback
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments import config as configuration
from experiments import launchers, rows
from experiments.plan import Cell, identify, measured
from experiments.provenance import provenance
from experiments.store import ResultsError, Standing, Store

log = logging.getLogger(__name__)
_ROOT = Path(__file__).resolve().parents[1]
FULL_ERROR = "HYDRA_FULL_ERROR"
_full_error_wanted = os.environ.get(FULL_ERROR) == "1"
EXPECTED = (HydraException, OmegaConfBaseException, ValueError, OSError, ImportError)  # what wrong input ends in


def job(config: DictConfig) -> None:
    """One run by Hydra's hand. Alone it ends the program with one line where it cannot be had; in a sweep it goes on to
    the next, unless the results folder cannot be written."""
    rows.register()  # launchers run this in processes of their own
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        if measured(config):
            _measure(config)
        else:
            cell = identify(config)
            standing = attempt(cell, sweeping)
            if first() and not sweeping:
                _tell(cell, standing)
    except EXPECTED as error:
        if sweeping and not isinstance(error, ResultsError):
            raise
        stop(error)  # here already: Hydra would add a line of its own


def _measure(config: DictConfig) -> None:
    from experiments.bench import run_bench
    from experiments.cost.measure import run_cost

    config = rows.choose(config)
    typed: configuration.Config = OmegaConf.to_object(config)  # type: ignore[assignment]
    for part, run in ((typed.bench, run_bench), (typed.cost, run_cost)):
        if part is not None:
            log.info("\n".join(map(str, run(typed, configuration.resolved(config)))))


def _tell(cell: Cell, standing: Standing) -> None:
    path = Store(cell.config.results).path(cell.id)
    if standing.state == "failed":
        assert standing.record
        if _full_error_wanted:
            print(standing.record["traceback"], file=sys.stderr)
        stop(f"{cell.label} failed: {standing.record['error']} (traceback in {path}; --retry-failed runs it again)")
    if standing.state == "running":
        stop(f"{cell.label} is being run by {standing.owner or 'another process'}")
    from experiments.drawing import draw_record

    log.info("record %s%s", path, "".join(f"\nfigure {figure}" for figure in draw_record(path)))


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
            from experiments.cell import run_cell  # imports torch: a cell that is done does not wait for it

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


def first() -> bool:
    """Whether this is the only process or, of several that torchrun launched, the first."""
    return os.environ.get("RANK", "0") == "0"


def together() -> bool:
    """Whether several processes, launched by torchrun, train one cell together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


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


def _as_the_first(settled: Standing | None, device: str) -> Standing | None:
    """What the first of several processes has decided."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from experiments.models import choose_device

    PartialState(cpu=choose_device(device).type == "cpu")
    said = [settled]
    broadcast_object_list(said)
    return said[0]


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


def stop(error: BaseException | str) -> NoReturn:
    """End with one line, or with the whole stack where HYDRA_FULL_ERROR=1 asks for it."""
    if _full_error_wanted and isinstance(error, BaseException):
        raise error
    print(f"error: {one_line(error)}", file=sys.stderr)
    sys.exit(1)


def one_line(error: BaseException | str) -> str:
    """What is wrong, without the parts of Hydra's messages that repeat it."""
    causes = (error, error.__cause__) if isinstance(error, HydraException) else (error,)
    text = " ".join(str(cause).split("\nfull_key")[0] for cause in causes if cause is not None)
    return " ".join((text + launchers.missing(text)).split())
