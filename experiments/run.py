"""Run one cell, or with `-m` a sweep of them: `python -m experiments.run experiment=attention model=tiny`."""

from __future__ import annotations

import os
import sys

import hydra
from hydra._internal.utils import get_args_parser

from experiments.config import registry as configuration
from experiments.errors import EXPECTED, FULL_ERROR, stop
from experiments.sweeps.launch import sweep
from experiments.task import job

_RETRY = "--retry-failed"


def main() -> None:
    configuration.register()
    os.environ[FULL_ERROR] = "1"  # Hydra then raises instead of printing, and main alone decides what is shown
    sys.argv[1:] = _flag_as_override(sys.argv[1:])
    given = get_args_parser().parse_args()
    try:
        if given.multirun and not (given.help or given.hydra_help):
            sys.exit(sweep(given.overrides, job))
        hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")(job)()
    except EXPECTED as error:
        stop(error)
    except KeyboardInterrupt:
        print("interrupted: the same command takes up where this one stopped", file=sys.stderr)
        sys.exit(130)


def _flag_as_override(arguments: list[str]) -> list[str]:
    """Hydra takes no flags but its own, and all overrides in one place."""
    found = [argument for argument in arguments if argument != _RETRY]
    if len(found) < len(arguments):
        overrides = (i for i, argument in enumerate(found) if "=" in argument and not argument.startswith("-"))
        found.insert(next(overrides, len(found)), "retry_failed=true")
    return found


if __name__ == "__main__":
    main()
