"""Run one cell, or with `-m` a sweep of them: `python -m experiments.run experiment=attention model=tiny`."""

from __future__ import annotations

import argparse
import os
import sys

import hydra

from experiments.config.registry import register_configs
from experiments.errors import FULL_ERROR_VARIABLE, INPUT_ERRORS, exit_with_error
from experiments.sweeps.hydra_api import (
    CONF,
    ConfigSource,
    flags_first,
    list_groups_without_copies,
    name_failing_override,
    parse_command_line,
)
from experiments.sweeps.launch import run_sweep
from experiments.task import run_job

_RETRY_FLAG = "--retry-failed"


def main() -> None:
    """Run the command line. Wrong input ends the program with one line."""
    register_configs()
    os.environ[FULL_ERROR_VARIABLE] = "1"  # Hydra then raises instead of printing; what is shown is decided here
    sys.argv[1:] = flags_first(_with_retry_override(sys.argv[1:]))
    arguments = parse_command_line()
    try:
        if _is_sweep(arguments):
            status = run_sweep(arguments.overrides, run_job, ConfigSource.from_flags(arguments))
            if status is not None:
                sys.exit(status)
        with name_failing_override(), list_groups_without_copies():
            hydra.main(version_base="1.3", config_path=CONF, config_name="config")(run_job)()
    except INPUT_ERRORS as error:
        exit_with_error(error)
    except KeyboardInterrupt:
        print("interrupted: the same command resumes", file=sys.stderr)
        sys.exit(130)


def run_script() -> None:
    """Run the console script `llava-mini-run`, which ignores packages of the current folder.

    The variable keeps them from the processes of launchers too. Python 3.10 does not know it.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    main()


def _is_sweep(arguments: argparse.Namespace) -> bool:
    """Return whether a command line asks for a sweep, and for nothing that Hydra does instead of running."""
    others = ("help", "hydra_help", "cfg", "info", "run", "shell_completion", "version")
    multirun = arguments.multirun or "hydra.mode=MULTIRUN" in arguments.overrides
    return multirun and not any(getattr(arguments, name, None) for name in others)


def _with_retry_override(arguments: list[str]) -> list[str]:
    """Replace the flag --retry-failed by an override. Hydra takes no flags but its own, and all overrides in a row."""
    others = [argument for argument in arguments if argument != _RETRY_FLAG]
    if len(others) < len(arguments):
        overrides = (i for i, argument in enumerate(others) if "=" in argument and not argument.startswith("-"))
        others.insert(next(overrides, len(others)), "retry_failed=true")
    return others


if __name__ == "__main__":
    main()
