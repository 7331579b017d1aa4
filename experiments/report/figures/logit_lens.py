"""Logit-lens figure: rank and log-probability of the right answer's first token, by layer."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.records.views import Record, parse_outcomes, percent_right
from experiments.report.figures.record_part import require_part
from experiments.report.figures.style import MEASURED, REFERENCES, WIDTH, ReportFigure, legend, styled
from experiments.report.statistics import mean_interval


@styled
def lens_figure(record: Record) -> Figure:
    """Draw the accuracy of the logit lens after each layer, and below it the token's mean log-probability (nats).

    The band is a 95% bootstrap interval over questions. The text-only guess is drawn if the record has it.

    Args:
        record: A finished record with a logit lens.

    Raises:
        ValueError: if the record holds no logit lens.
    """
    lens = require_part(record, "lens", "logit lens")
    figure = ReportFigure(figsize=(WIDTH, 4.0), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    x = np.arange(len(lens["depths"]))
    mean, low, high = mean_interval(percent_right(lens["depths"]))
    above.fill_between(x, low, high, color=MEASURED["color"], alpha=0.22, linewidth=0)
    above.plot(x, mean, **MEASURED, clip_on=False, label="measured, 95% band")
    if (guess := record["data"].get("guess")) is not None:
        value = 100 * parse_outcomes(guess).mean()
        above.axhline(value, **REFERENCES[2], linewidth=1.1, zorder=1.5, label="text-only guess")
    above.set_title("The right answer's first token ranks first", loc="left")
    above.set_ylabel("Questions (%)")
    above.set_ylim(0, 103)
    below.plot(x, [run["logprob"] for run in lens["depths"]], **MEASURED, clip_on=False)
    below.set_title("Mean log-probability of that token", loc="left")
    below.set_ylabel("Nats")
    below.set_ylim(top=0)
    below.set_xlabel("After layer")
    below.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    below.set_xlim(-0.3, x[-1] + 0.3)
    legend(figure, [above], columns=2)
    return figure
