"""The list of a report's figures: title, caption and drawing function of each, or the reason why it is missing."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.figure import Figure

from experiments.records.views import Record, record_label, record_seed
from experiments.report import captions, figures
from experiments.report.claims.registry import Finding
from experiments.report.experiment_results import ExperimentResults
from experiments.report.figures.cost import COST_MEASURES
from experiments.report.run_groups import RunGroup, name_differing_settings

COST_SUFFIX = "_cost"
"""Ending of the stem of an experiment's cost figure."""
CURVES_SUFFIX = "_learning_curves"
"""Ending of the stem of an experiment's learning-curve figure."""
CLAIMS_STEM, REMOVAL_STEM, ABLATION_STEM = "claims", "removal_by_block", "ablation"
"""Stems of the figures that the page opens with."""
PROBE_SEPARATOR = "_of_"
"""Between the stem of a probe's figure and the name of its analysis, where there are several."""
EXPERIMENT_SUFFIXES = ("", CURVES_SUFFIX, COST_SUFFIX)
"""Endings of the stems of all figures of an experiment, in the order of the page."""


@dataclass(frozen=True)
class FigureEntry:
    """One figure of a report.

    Args:
        stem: Name of the figure's files without suffix.
        title: Heading of the figure.
        caption: Text below the figure; if it cannot be drawn, the reason.
        draw: Function that draws the figure, None if it cannot be drawn.
    """

    stem: str
    title: str
    caption: str
    draw: Callable[[], Figure] | None


def figure_entries(
    experiments: Sequence[ExperimentResults],
    probed: Sequence[Record],
    ablation: Sequence[RunGroup],
    findings: Sequence[Finding] = (),
) -> Iterator[FigureEntry]:
    """List every figure of a report, in order.

    Each experiment has a figure of its rows, one of their learning curves if they were measured, and one of their cost if
    they differ in it. Each probe has a figure for every analysis that holds it, of several seeds the first. The ablation
    figures show the largest family of run groups.

    Args:
        experiments: Experiments with their runs. If there are any, other figures that were not run are left out.
        probed: Records with a probe, in order of preference.
        ablation: Run groups that belong to no experiment, compared with their baselines.
        findings: The answers to the paper's claims.
    """
    if not all(math.isnan(finding.estimate.value) for finding in findings):
        yield FigureEntry(CLAIMS_STEM, "The paper's claims", captions.CLAIMS, partial(figures.claims_figure, findings))
    for results in experiments:
        yield from _experiment_entries(results)
    for stem, title, part, draw, caption in _PROBE_FIGURES:
        analyses = _one_of_each_analysis([record for record in probed if record.get(part) is not None])
        for number, (name, record) in enumerate(analyses.items()):
            text = f"{caption(record)} {captions.probe_source(record)}"
            # The first keeps the plain stem, which notebooks and pages name.
            own_stem = (
                stem if number == 0 else f"{stem}{PROBE_SEPARATOR}{re.sub(r'[^A-Za-z0-9.]+', '_', name).strip('_')}"
            )
            yield FigureEntry(
                own_stem, title if len(analyses) == 1 else f"{title}: {name}", text, partial(draw, record)
            )
        if not analyses and stem not in _UNMENTIONED_STEMS and (probed or not experiments):
            note = next((f" ({note})" for record in probed if (note := record.get(f"{part}_note"))), "")
            yield FigureEntry(stem, title, f"Not drawn: no finished record holds {part} measurements{note}.", None)
    if ablation or not experiments:
        yield from _ablation_entries(ablation)


def _one_of_each_analysis(records: Sequence[Record]) -> dict[str, Record]:
    """Return the first record of each name, by the name without the seed."""
    analyses: dict[str, Record] = {}
    for record in records:
        words = record_label(record).split(", ")
        analyses.setdefault(", ".join(word for word in words if word != f"seed {record_seed(record)}"), record)
    return analyses


def _experiment_entries(results: ExperimentResults) -> Iterator[FigureEntry]:
    title = results.spec.title
    if not results.finished_rows:
        yield FigureEntry(results.name, title, "Not drawn: no row is finished.", None)
        return
    draw_rows = partial(figures.rows_figure, results)
    yield FigureEntry(results.name, title, captions.experiment_rows(results), draw_rows)
    if rows := figures.rows_with_curves(results):
        yield FigureEntry(
            f"{results.name}{CURVES_SUFFIX}",
            f"Learning curves: {results.name}",
            captions.learning_curves(results, rows),
            partial(figures.learning_curves_figure, results),
        )
    if figures.differing_costs(results):
        title = f"Accuracy against cost: {results.name}"
        draw_cost = partial(figures.experiment_cost_figure, results)
        yield FigureEntry(f"{results.name}{COST_SUFFIX}", title, captions.EXPERIMENT_COST, draw_cost)


def _ablation_entries(ablation: Sequence[RunGroup]) -> Iterator[FigureEntry]:
    families = Counter(group.family for group in ablation if group.finished)
    # Groups trained differently, or on other data, cannot share axes.
    largest = families.most_common(1)[0][0] if families else None
    groups = name_differing_settings([group for group in ablation if group.family == largest])
    for (stem, title), draw, text, reason in zip(
        _ABLATION_TITLES.items(),
        (figures.ablation_figure, figures.ablation_cost_figure),
        (captions.ABLATION, captions.ABLATION_COST),
        (
            None if any(group.finished for group in groups) else "no finished ablation cell to draw",
            None if COST_MEASURES[0].measured(groups) else "no finished ablation cell counts its FLOPs",
        ),
        strict=True,
    ):
        if reason is not None:
            yield FigureEntry(stem, title, f"Not drawn: {reason}.", None)
        else:
            caption = f"{text} {captions.ablation_sample(groups, len(families))}"
            yield FigureEntry(stem, title, caption, partial(draw, groups))


_UNMENTIONED_STEMS = ("knockout_by_kind", "contribution_by_layer", "sinks_by_layer", "swaps_by_property")
"""Stems of figures that a report does not mention if no record has what they need."""
_PROBE_FIGURES: tuple[tuple[str, str, str, Callable[[Record], Figure], Callable[[Record], str]], ...] = (
    (
        REMOVAL_STEM,
        "Accuracy without visual tokens",
        "removal",
        figures.removal_figure,
        captions.removal,
    ),
    (
        "fusion_by_curve",
        "Fusion depth by curve",
        "knockout",
        figures.fusion_figure,
        captions.fusion,
    ),
    (
        "knockout_by_kind",
        "Knock-out by question type",
        "knockout",
        figures.knockout_types_figure,
        captions.knockout_types,
    ),
    (
        "attention_by_layer",
        "Attention mass by layer",
        "attention",
        figures.attention_figure,
        captions.attention_mass,
    ),
    (
        "entropy_by_layer",
        "Attention entropy by layer",
        "attention",
        figures.entropy_figure,
        captions.attention_entropy,
    ),
    (
        "contribution_by_layer",
        "Contribution of the image by layer",
        "contribution",
        figures.contribution_figure,
        captions.contribution,
    ),
    (
        "sinks_by_layer",
        "Visual attention sinks by layer",
        "sinks",
        figures.sinks_figure,
        captions.sinks,
    ),
    (
        "lens_by_layer",
        "Logit lens: the right answer's first token by layer",
        "lens",
        figures.lens_figure,
        captions.logit_lens,
    ),
    (
        "swaps_by_property",
        "Reading layer by property",
        "swaps",
        figures.swaps_figure,
        captions.swaps,
    ),
)
"""Stem, title, required part of the record, drawing function and caption of each probe's figure."""
_ABLATION_TITLES = {
    ABLATION_STEM: "Accuracy by visual tokens, pre-fusion depth and compressor",
    "accuracy_vs_cost": "Accuracy against cost",
}
"""Titles of the ablation figures by stem."""
PROBE_STEMS = tuple(entry[0] for entry in _PROBE_FIGURES)
"""Stems of the probes' figures, of which there may be several."""
FIXED_STEMS = (CLAIMS_STEM, *PROBE_STEMS, *_ABLATION_TITLES)
"""Stems of the figures that belong to no experiment."""
