"""Line plots of attention mass, entropy and contribution by layer."""

from __future__ import annotations

from typing import Any, Protocol

import matplotlib
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from probes.plots.style import FIGURE_STYLE, NotebookFigure, line_styles


class AttentionStatistics(Protocol):
    """Attributes of a `probes.AttentionRecord` that `plot_attention` reads."""

    layers: tuple[int, ...]
    targets: tuple[str, ...]
    sources: tuple[str, ...]
    statistics: tuple[str, ...]

    @property
    def mass(self) -> Float[Tensor, "layers batch heads targets sources"]: ...

    @property
    def entropy(self) -> Float[Tensor, "layers batch heads targets sources"]: ...

    @property
    def contribution(self) -> Float[Tensor, "layers batch heads targets sources"]: ...


_ROWS = {
    "mass": ("Attention mass (%)", 100.0),
    "entropy": ("Entropy within the source (nats)", 1.0),
    "contribution": ("Contribution (norm)", 1.0),
}
"""Label and scale of each statistic that has a row."""


@matplotlib.rc_context(FIGURE_STYLE)
def plot_attention(record: AttentionStatistics) -> Figure:
    """Plot the mass (%), entropy (nats) and contribution (norm) of each target group's attention to each source, by layer.

    A line is the mean over heads and samples. Its band goes from the 10th to the 90th percentile of the heads, each
    averaged over the samples. Samples whose value is undefined are left out.

    Args:
        record: Attention that `record_attention` recorded.

    Returns:
        Figure with a row for each of these statistics that was recorded, and a column for each target.

    Raises:
        ValueError: The record holds no query of any target.

    Example:
        >>> from probes import record_attention
        >>> with torch.no_grad(), record_attention(model, tokens) as attention:
        ...     output = model(**inputs)
        >>> figure = plot_attention(attention)
    """
    by_head = [  # [layers, heads, targets, sources]
        (label, scale * getattr(record, name).nanmean(dim=1))
        for name, (label, scale) in _ROWS.items()
        if name in record.statistics
    ]
    mass = by_head[0][1]
    targets = [index for index in range(len(record.targets)) if mass[:, :, index].isfinite().any()]
    if not targets:
        raise ValueError("the record has no query of any target: there is nothing to draw")
    samples = record.mass.shape[1]
    figure = NotebookFigure(figsize=(max(2.4 * len(targets), 5.8), 2.3 * len(by_head)), layout="constrained")
    axes = figure.subplots(len(by_head), len(targets), squeeze=False, sharex=True, sharey="row")
    styles = line_styles(record.sources)
    drawn_lines: dict[str, Any] = {}
    for row, (label, values) in zip(axes, by_head, strict=True):
        row[0].set_ylabel(label)
        for axis, target in zip(row, targets, strict=True):
            for source, name in enumerate(record.sources):
                layer_heads = values[:, :, target, source]
                if not layer_heads.isfinite().any():
                    continue
                low, high = layer_heads.nanquantile(torch.tensor([0.1, 0.9]), dim=1)
                axis.fill_between(record.layers, low, high, color=styles[name]["color"], alpha=0.15, linewidth=0)
                drawn_lines[name] = axis.plot(record.layers, layer_heads.nanmean(dim=1), **styles[name])[0]
            axis.grid(True)
            axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        row[0].set_ylim(bottom=0)
    axes[0, 0].set_ylim(0, 103)
    for axis, target in zip(axes[0], targets, strict=True):
        axis.set_title(f"queries: {record.targets[target]}", loc="left")
    for axis in axes[-1]:
        axis.set_xlabel("Layer (from 0)")
    explanation = f"mean over {mass.shape[1]} heads, n = {samples}; band: 10th to 90th percentile of the heads"
    figure.legend(
        drawn_lines.values(),
        drawn_lines,
        loc="outside lower center",
        ncols=len(drawn_lines),
        title=f"attention to ({explanation})",
        title_fontsize=7.5,
    )
    return figure
