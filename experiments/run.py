"""Run one cell, or with `-m` a sweep of them: `python -m experiments.run experiment=attention model=tiny`."""

from __future__ import annotations

import os
import sys

import hydra

from experiments.config.registry import register_configs
from experiments.errors import FULL_ERROR_VARIABLE, INPUT_ERRORS, exit_with_error
from experiments.sweeps.hydra_api import parse_command_line
from experiments.sweeps.launch import run_sweep
from experiments.task import run_job

_RETRY_FLAG = "--retry-failed"


def main() -> None:
    """Run the command line. Wrong input ends the program with one line."""
    register_configs()
    os.environ[FULL_ERROR_VARIABLE] = "1"  # Hydra then raises instead of printing; what is shown is decided here
    sys.argv[1:] = _with_retry_override(sys.argv[1:])
    arguments = parse_command_line()
    try:
        if arguments.multirun and not (arguments.help or arguments.hydra_help):
            sys.exit(run_sweep(arguments.overrides, run_job))
        hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")(run_job)()
    except INPUT_ERRORS as error:
        exit_with_error(error)
    except KeyboardInterrupt:
        print("interrupted: the same command resumes", file=sys.stderr)
        sys.exit(130)


def _with_retry_override(arguments: list[str]) -> list[str]:
    """Replace the flag --retry-failed by an override. Hydra takes no flags but its own, and all overrides in a row."""
    others = [argument for argument in arguments if argument != _RETRY_FLAG]
    if len(others) < len(arguments):
        overrides = (i for i, argument in enumerate(others) if "=" in argument and not argument.startswith("-"))
        others.insert(next(overrides, len(others)), "retry_failed=true")
    return others


if __name__ == "__main__":
    main()
