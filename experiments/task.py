"""TODO"""

from __future__ import annotations

import logging
import sys

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments.cell import Cell
from experiments.config import plain, rows, schema
from experiments.errors import EXPECTED, _full_error_wanted, stop
from experiments.sweeps import plan
from experiments.sweeps.distributed import first
from experiments.sweeps.plan import identify, measured
from experiments.sweeps.runner import attempt
from experiments.sweeps.store import ResultsError, Standing, Store

log = logging.getLogger(__name__)


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
    from experiments.benchmarks.model_cost.run import run_cost
    from experiments.benchmarks.probe_overhead import run_bench

    config = plan.choose(config)
    typed: schema.Config = OmegaConf.to_object(config)  # type: ignore[assignment]
    for part, run in ((typed.bench, run_bench), (typed.cost, run_cost)):
        if part is not None:
            log.info("\n".join(map(str, run(typed, plain.resolved(config)))))


def _tell(cell: Cell, standing: Standing) -> None:
    path = Store(cell.config.results).path(cell.id)
    if standing.state == "failed":
        assert standing.record
        if _full_error_wanted:
            print(standing.record["traceback"], file=sys.stderr)
        stop(f"{cell.label} failed: {standing.record['error']} (traceback in {path}; --retry-failed runs it again)")
    if standing.state == "running":
        stop(f"{cell.label} is being run by {standing.owner or 'another process'}")
    from experiments.report.figures.record import draw_record

    log.info("record %s%s", path, "".join(f"\nfigure {figure}" for figure in draw_record(path)))
