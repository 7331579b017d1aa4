"""Run one cell, or with `-m` a sweep of them: `python -m experiments.run experiment=attention model=tiny`."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments import config as configuration
from experiments import launchers, rows

log = logging.getLogger("experiments.run")  # under `python -m` __name__ is "__main__"
_FULL_ERROR = "HYDRA_FULL_ERROR"
_full_error_wanted = os.environ.get(_FULL_ERROR) == "1"
EXPECTED = (HydraException, OmegaConfBaseException, ValueError, OSError, ImportError)  # what wrong input ends in


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")
def cell(config: DictConfig) -> None:
    # torch and transformers are imported after the configuration has been accepted: a typing error costs no wait
    import torch

    from experiments.bench import run_bench
    from experiments.cell import run_cell
    from experiments.cost.measure import run_cost
    from experiments.drawing import draw_record

    try:
        config = rows.choose(config)
        typed: configuration.Config = OmegaConf.to_object(config)  # type: ignore[assignment]
        measures = [run for part, run in ((typed.bench, run_bench), (typed.cost, run_cost)) if part is not None]
        for run in measures:
            log.info("\n".join(map(str, run(typed, configuration.resolved(config)))))
        if measures:
            return
        torch.set_num_threads(typed.threads)
        path = run_cell(typed, configuration.resolved(config))
    except EXPECTED as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            log.error("error: %s", one_line(error))
            raise  # Hydra keeps it until the sweep's other cells have run, here or in a launcher's process
        stop(error)  # here already: Hydra would add a line of its own
    if path is None:
        return
    figures = draw_record(path)
    log.info("record %s%s", path, "".join(f"\nfigure {f}" for f in figures))


def stop(error: BaseException) -> NoReturn:
    """End with one line, or with the whole stack where HYDRA_FULL_ERROR=1 asks for it."""
    if _full_error_wanted:
        raise error
    print(f"error: {one_line(error)}", file=sys.stderr)
    sys.exit(1)


def one_line(error: BaseException) -> str:
    """What is wrong, without the parts of Hydra's messages that repeat it."""
    causes = (error, error.__cause__) if isinstance(error, HydraException) else (error,)
    text = " ".join(str(cause).split("\nfull_key")[0] for cause in causes if cause is not None)
    return " ".join((text + launchers.missing(text)).split())


def main() -> Any:
    configuration.register()
    os.environ[_FULL_ERROR] = "1"  # Hydra then raises instead of printing, and main alone decides what is shown
    try:
        return cell()
    except EXPECTED as error:
        stop(error)
    except Exception as error:
        lost = launchers.lost(error)
        if lost is None:
            raise
        stop(RuntimeError(lost))
    except KeyboardInterrupt:
        print("interrupted: the same command takes up where this one stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
