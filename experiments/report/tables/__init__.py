"""The tables of a report, one module for each."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.report.experiment_results import Study
from experiments.report.tables.experiment_rows import row_table
from experiments.report.tables.orderings import orderings_table
from experiments.report.tables.table import Table


def study_tables(studies: Sequence[Study]) -> list[Table]:
    """All tables of some studies, in their order."""
    return [table for study in studies for table in (row_table(study), orderings_table(study)) if table is not None]
