"""Style of all figures: sizes, a colour-blind-safe palette (Okabe and Ito), line styles that differ in greyscale too."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

P = ParamSpec("P")
T = TypeVar("T")

WIDTH = 7.2
"""Width of a figure in inches: both columns of a two-column paper."""

BLACK, BLUE, ORANGE, GREEN, GREY = "#1a1a1a", "#0072b2", "#d55e00", "#009e73", "#767676"
MEASURED: dict[str, Any] = {"color": BLUE, "marker": "o", "linestyle": "-"}
SECOND: dict[str, Any] = {"color": GREEN, "marker": "D", "linestyle": "-"}
CONTROL: dict[str, Any] = {"color": ORANGE, "marker": "s", "linestyle": "--", "markerfacecolor": "white"}
REFERENCES: tuple[dict[str, Any], ...] = (
    {"color": BLACK, "linestyle": "-"},
    {"color": GREY, "linestyle": "-."},
    {"color": BLACK, "linestyle": ":"},
)
# Light to dark, so that an ordered quantity keeps its order in greyscale.
ORDERED = ("#5ab4e5", "#2f8ac4", "#0b5c9a", "#003a70", "#001f3f", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P")
LINESTYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))

_SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "legend.handlelength": 3.2,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "pdf.fonttype": 42,  # TrueType, because some venues reject the default, Type 3
    "savefig.dpi": 200,
}


def styled(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function to run under this style and to leave matplotlib's settings unchanged."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with matplotlib.rc_context(_SETTINGS):
            return function(*args, **kwargs)

    return run


class ReportFigure(Figure):
    """A figure that Jupyter displays without pyplot."""

    @styled
    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def make_panels(count: int, columns: int, height: float, label: str) -> tuple[Figure, list[Axes]]:
    """Make a figure with panels that share one y axis.

    Args:
        count: Number of panels.
        columns: Most panels in a row.
        height: Height of a row in inches.
        label: Label of the y axis.

    Returns:
        The figure and its panels, row by row.
    """
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = ReportFigure(figsize=(WIDTH, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for first in axes[:, 0]:
        first.set_ylabel(label)
    for unused in axes.flat[count:]:
        unused.remove()
    return figure, list(axes.flat[:count])


def legend(figure: Figure, axes: list[Axes], columns: int) -> None:
    """Add one legend below the panels, so that it covers no data: measurements first, then reference lines.

    A label that several panels use appears once.
    """
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    labels = sorted(entries, key=lambda label: _is_reference(entries[label]))
    handles = [entries[label] for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)))


def mark_depth(axis: Axes, depth: Mapping[str, Any], label: str) -> None:
    """Mark a fusion depth with a dotted line and its interval with a shade."""
    axis.axvspan(depth["low"] - 0.04, depth["high"] + 0.04, color=GREEN, alpha=0.12, linewidth=0)
    axis.axvline(depth["depth"], color=GREEN, linestyle=(0, (1, 1)), linewidth=1.2, label=label)


def _is_reference(handle: object) -> bool:
    return isinstance(handle, Line2D) and "None" in (handle.get_marker(), handle.get_linestyle())


@styled
def save(figure: Figure, stem: Path | str) -> tuple[Path, Path]:
    """Write a figure as PNG (200 dots per inch) and PDF.

    Args:
        figure: The figure; its layout is fixed by the first call.
        stem: Path of the files without their suffix; missing folders are made.

    Returns:
        Paths of the PNG and the PDF.
    """
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    png, pdf = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.pdf")
    # Widths of letters depend on the resolution, so the layout uses the resolution of the file.
    figure.set_dpi(_SETTINGS["savefig.dpi"])
    # Place the panels once: savefig would repeat it for each file, and it takes as long as drawing.
    if (layout := figure.get_layout_engine()) is not None:
        layout.execute(figure)
    figure.set_layout_engine(None)
    figure.savefig(png)
    # Without a date, the same records give the same bytes.
    figure.savefig(pdf, metadata={"CreationDate": None})
    return png, pdf
