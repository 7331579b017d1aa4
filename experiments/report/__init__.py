"""Tables, figures and an HTML page from record files.

`load(folder)` opens the results folder of a study for a notebook:

    report = load("results/smol")
    report.table("fusion_depth")
    report.figure("removal_by_block")
    report.frame().groupby("question_type").image.mean()

`python -m experiments.report` writes the whole report to files. The package reads only record files and
conf/experiment/. It imports no model, so a report can be made wherever the records are.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.report.results import load
    from experiments.report.statistics import mean_interval

__all__ = ["load", "mean_interval"]


def __getattr__(name: str) -> Any:
    # pandas and matplotlib take seconds to import, so modules that need only part of this package do not pay for them.
    if name == "load":
        from experiments.report.results import load

        return load
    if name == "mean_interval":
        from experiments.report.statistics import mean_interval

        return mean_interval
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
