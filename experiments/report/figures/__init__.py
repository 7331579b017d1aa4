"""Figures, one file each: `attention_figure(record)`, `entropy_figure(record)`, `fusion_figure(record)`,
`lens_figure(record)` and `removal_figure(record)` draw a single record; `rows_figure(study)` draws an experiment's rows,
`study_cost_figure(study)` what they cost where `costs_apart(study)`; `ablation_figure(cells)` and `cost_figure(cells)` a
sweep. `save(figure, stem)` writes PNG and PDF."""

from experiments.report.figures.ablation import ablation_figure
from experiments.report.figures.attention import attention_figure, entropy_figure
from experiments.report.figures.cost import cost_figure, costs_apart, study_cost_figure
from experiments.report.figures.experiment_rows import rows_figure
from experiments.report.figures.fusion_depth import fusion_figure
from experiments.report.figures.logit_lens import lens_figure
from experiments.report.figures.removal import removal_figure
from experiments.report.figures.style import save

__all__ = [
    "ablation_figure",
    "attention_figure",
    "cost_figure",
    "costs_apart",
    "entropy_figure",
    "fusion_figure",
    "lens_figure",
    "removal_figure",
    "rows_figure",
    "save",
    "study_cost_figure",
]
