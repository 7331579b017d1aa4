"""Helpers of the notebooks: the records that ship with the project, and one line where records lack a measurement."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import experiments

P = ParamSpec("P")
T = TypeVar("T")


def shipped_results(study: str) -> Path:
    """Return the results folder of a study that ships with the project, from any working directory.

    Args:
        study: Name of the folder in results/: "tiny" or "smol".

    Raises:
        FileNotFoundError: if neither the checkout of this package nor a folder above the working directory has it.

    Example:
        >>> from experiments.report.notebook import shipped_results
        >>> shipped_results("tiny").name
        'tiny'
    """
    checkout = Path(experiments.__file__).parents[1]
    for root in (checkout, Path.cwd(), *Path.cwd().parents):
        if (root / "results" / study / "records").is_dir():
            return root / "results" / study
    raise FileNotFoundError(
        f"results/{study}: not in {checkout} and not above {Path.cwd()}; start Jupyter in a checkout of the project, or "
        "name a results folder of your own in the line marked '# yours:'"
    )


def show(make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """Return what a function makes of some records, or print one line if they lack what it needs.

    Args:
        make: The function, such as `report.table`.
        args: Its arguments.
        kwargs: Its keyword arguments.

    Returns:
        Its result; None if it raised a ValueError or OSError, whose message is printed.

    Example:
        >>> from experiments.report import load
        >>> report = load("results/tiny")
        >>> show(report.table, "sight").name
        'sight'
        >>> show(report.figure, "no_such_figure")
        figure 'no_such_figure' is not in this report; choose from ...
    """
    try:
        return make(*args, **kwargs)
    except (ValueError, OSError) as error:
        print(error)
        return None
