"""Tables of a report, one module for each."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.report.experiment_results import ExperimentResults
from experiments.report.tables.experiment_rows import experiment_table
from experiments.report.tables.orderings import orderings_table
from experiments.report.tables.table import Table


def experiment_tables(experiments: Sequence[ExperimentResults]) -> list[Table]:
    """Return the tables of experiments, in order: the rows, then the paper's orderings if the paper prints values."""
    tables = [table for results in experiments for table in (experiment_table(results), orderings_table(results))]
    return [table for table in tables if table is not None]
