"""Figures of a report, one module for each.

- One record: `attention_figure`, `contribution_figure`, `entropy_figure`, `fusion_figure`, `knockout_types_figure`,
  `lens_figure`, `removal_figure`, `sinks_figure` and `swaps_figure`.
- One experiment: `rows_figure` shows its rows; `experiment_cost_figure` shows accuracy against each of `differing_costs`;
  `learning_curves_figure` shows the training of `rows_with_curves`.
- All records: `claims_figure`.
- All ablations: `ablation_figure` and `ablation_cost_figure`.

`save` writes a figure as PNG and PDF.
"""

from experiments.report.figures.ablation import ablation_figure
from experiments.report.figures.attention import attention_figure, entropy_figure
from experiments.report.figures.claims import claims_figure
from experiments.report.figures.contribution import contribution_figure
from experiments.report.figures.cost import ablation_cost_figure, differing_costs, experiment_cost_figure
from experiments.report.figures.experiment_rows import rows_figure
from experiments.report.figures.fusion_depth import fusion_figure
from experiments.report.figures.knockout_types import knockout_types_figure
from experiments.report.figures.learning_curves import learning_curves_figure, rows_with_curves
from experiments.report.figures.logit_lens import lens_figure
from experiments.report.figures.removal import removal_figure
from experiments.report.figures.sinks import sinks_figure
from experiments.report.figures.style import save
from experiments.report.figures.swaps import swaps_figure

__all__ = [
    "ablation_cost_figure",
    "ablation_figure",
    "attention_figure",
    "claims_figure",
    "contribution_figure",
    "differing_costs",
    "entropy_figure",
    "experiment_cost_figure",
    "fusion_figure",
    "knockout_types_figure",
    "learning_curves_figure",
    "lens_figure",
    "removal_figure",
    "rows_figure",
    "rows_with_curves",
    "save",
    "sinks_figure",
    "swaps_figure",
]
