"""Tables of a report, one module for each."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.report.experiment_results import ExperimentResults
from experiments.report.tables.experiment_rows import experiment_table
from experiments.report.tables.generated_scores import with_published_column, with_score_columns
from experiments.report.tables.orderings import orderings_table
from experiments.report.tables.table import Table
from experiments.report.tables.uncut_comparison import with_uncut_columns


def experiment_tables(experiments: Sequence[ExperimentResults]) -> list[Table]:
    """Return the tables of experiments, in order: the rows, then the paper's orderings if the paper prints values.

    Rows with generated answers also have their scores, and the paper's if these are of the same benchmark and metric.
    The rows of an experiment without training also have the score relative to the first row, and the share of equal
    answers.
    """
    tables = []
    for results in experiments:
        table = with_uncut_columns(experiment_table(results), results)
        first, *others = [row.runs for row in results.rows]
        table = with_score_columns(table, [first, *others], [None, *[first] * len(others)])
        tables += [with_published_column(table, results), orderings_table(results)]
    return [table for table in tables if table is not None]
