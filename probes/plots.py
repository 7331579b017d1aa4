"""Figures of what the probes found: attention by layer, heat maps over the picture, and words of the logit lens.

Each function returns a matplotlib figure that a notebook shows inline; pyplot is not involved, nothing has to be closed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any, Protocol

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from probes.tokens.token_map import TokenMap

if TYPE_CHECKING:
    from probes.readouts.logit_lens import LogitLens

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "figure.dpi": 120,
    "savefig.dpi": 200,
}
# Okabe and Ito's colours, told apart with any colour vision; markers and dashes tell the lines apart in grey.
GROUP_LINES: dict[str, dict[str, Any]] = {
    "pad": {"color": "#767676", "marker": "x", "linestyle": ":"},
    "system": {"color": "#1a1a1a", "marker": "s", "linestyle": "-."},
    "vision": {"color": "#d55e00", "marker": "o", "linestyle": "-"},
    "instruction": {"color": "#0072b2", "marker": "D", "linestyle": "--"},
    "response": {"color": "#009e73", "marker": "^", "linestyle": (0, (5, 1, 1, 1))},
}
OTHER_COLORS = ("#cc79a7", "#56b4e9", "#e69f00", "#8a6d00")
SEQUENTIAL, DIVERGING, UNDEFINED = "YlOrRd", "PuOr_r", "#a6a6a6"
# How much of a cell's colour covers the picture, in the colour bar too.
COVER = 0.75
# Characters of a word that fit a cell, inches across a cell of words, and the most cells a table may have across.
WORD, CELL, WIDEST = 8, 0.62, 48


class Drawing(Figure):
    """A figure that notebooks show by themselves, without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=STYLE["figure.dpi"])
        return buffer.getvalue()


class RecordedAttention(Protocol):
    """What `plot_attention` reads of a `probes.AttentionRecord`, which has these attributes."""

    layers: tuple[int, ...]
    targets: tuple[str, ...]
    sources: tuple[str, ...]

    @property
    def mass(self) -> Float[Tensor, "layers batch heads targets sources"]: ...

    @property
    def entropy(self) -> Float[Tensor, "layers batch heads targets sources"]: ...


@matplotlib.rc_context(STYLE)
def plot_attention(record: RecordedAttention) -> Figure:
    """Mass (%) and entropy (nats) of each target group's attention to each source, by layer.

    Line: mean over heads and samples. Band: from the 10th to the 90th percentile of the heads, each averaged over the
    samples. Samples whose cell is undefined are left out.
    """
    rows = [("Attention mass (%)", 100 * record.mass), ("Entropy within the source (nats)", record.entropy)]
    by_head = [(label, values.nanmean(dim=1)) for label, values in rows]  # [layers, heads, targets, sources]
    targets = [index for index in range(len(record.targets)) if by_head[0][1][:, :, index].isfinite().any()]
    if not targets:
        raise ValueError("the record has no query of any target: there is nothing to draw")
    samples = record.mass.shape[1]
    figure = Drawing(figsize=(max(2.4 * len(targets), 5.8), 4.6), layout="constrained")
    axes = figure.subplots(2, len(targets), squeeze=False, sharex=True, sharey="row")
    lines = _group_lines(record.sources)
    drawn: dict[str, Any] = {}
    for line, (label, values) in zip(axes, by_head, strict=True):
        line[0].set_ylabel(label)
        for axis, target in zip(line, targets, strict=True):
            for source, name in enumerate(record.sources):
                cell = values[:, :, target, source]
                if not cell.isfinite().any():
                    continue
                low, high = cell.nanquantile(torch.tensor([0.1, 0.9]), dim=1)
                axis.fill_between(record.layers, low, high, color=lines[name]["color"], alpha=0.15, linewidth=0)
                drawn[name] = axis.plot(record.layers, cell.nanmean(dim=1), **lines[name])[0]
            axis.grid(True)
            axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        line[0].set_ylim(bottom=0)
    axes[0, 0].set_ylim(0, 103)
    for axis, target in zip(axes[0], targets, strict=True):
        axis.set_title(f"queries: {record.targets[target]}", loc="left")
    for axis in axes[1]:
        axis.set_xlabel("Layer (from 0)")
    heads = f"mean over {by_head[0][1].shape[1]} heads, n = {samples}; band: 10th to 90th percentile of the heads"
    title = f"attention to ({heads})"
    figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=len(drawn), title=title, title_fontsize=7.5)
    return figure


@matplotlib.rc_context(STYLE)
def plot_patches(
    picture: Any,
    tokens: TokenMap,
    maps: Mapping[str, Float[Tensor, " positions"]],
    sample: int = 0,
    image: int = 0,
    frame: int = 0,
    label: str = "",
) -> Figure:
    """The picture, and maps of one number for each visual token laid over it, all on one colour scale.

    The scale starts at 0, or is symmetric around 0 where there are negative values; undefined cells are grey. Tiles that overlap, such as a
    picture's overview and its details, get a panel each. Where the boxes of the tokens are not known, or all tokens
    share one, the maps stand beside the picture as rows and columns of tokens, not over it.

    Args:
        picture: Of this image or frame: a PIL image, or an array (height, width, channels).
        tokens: A map whose `places` are known.
        maps: Values at all positions of the sample by title, such as `{"layer 2": attention.received[2, 0].mean(0)[0]}`.
        sample, image, frame: Row of the batch, which of its pictures, which frame of a video.
        label: What the values are, and their unit.

    Raises ValueError when places are not known, there is no such image, or a map is not one number a position.
    """
    views, over = _views(tokens, sample, image, frame)
    values = {title: torch.as_tensor(part).detach().float().cpu() for title, part in maps.items()}
    length = tokens.labels.shape[1]
    for title, part in values.items():
        if part.shape != (length,):
            raise ValueError(f"map {title!r} has shape {list(part.shape)}: one value for each of {length} positions")
    if not values:
        raise ValueError("no map to draw: give at least one, by title")
    shown = torch.cat([part[view.positions] for part in values.values() for view in views]).numpy()
    finite = shown[np.isfinite(shown)]
    most = float(np.abs(finite).max()) if finite.size else 1.0
    signed = bool((finite < 0).any())
    norm = Normalize(-most if signed else 0.0, most or 1.0)
    colors = matplotlib.colormaps[DIVERGING if signed else SEQUENTIAL].with_extremes(bad=UNDEFINED)

    panels = [(title, view) for title in values for view in views]
    # One view: the maps follow the picture, row by row. Several: a row for each map, behind the picture's column.
    columns = min(len(panels) + 1, 4) if len(views) == 1 else len(views) + 1
    count = -(-(len(panels) + 1) // columns) if len(views) == 1 else len(values)
    picture = np.asarray(picture)
    aspect = min(max(picture.shape[0] / picture.shape[1], 0.4), 2.5)
    figure = Drawing(figsize=(1.95 * columns + 0.6, (1.95 * aspect + 0.3) * count), layout="constrained")
    axes = figure.subplots(count, columns, squeeze=False)
    axes[0, 0].imshow(picture, cmap="gray")
    axes[0, 0].set_title(f"sample {sample}", loc="left")
    free = axes.ravel()[1:] if len(views) == 1 else axes[:, 1:].ravel()
    for axis, (title, view) in zip(free, panels, strict=False):
        _background(axis, picture, view, over)
        _cells(axis, view, colors(norm(values[title][view.positions].numpy())))
        axis.set_title(title if len(views) == 1 else f"{title}, {view.name}", loc="left")
    for axis in axes.flat:
        axis.set_axis_off()
    figure.colorbar(ScalarMappable(norm, colors), ax=list(axes.flat), shrink=0.8, label=label, alpha=COVER)
    return figure


@matplotlib.rc_context(STYLE)
def plot_words(
    picture: Any,
    lens: LogitLens,
    tokenizer: Any,
    depth: int,
    sample: int = 0,
    image: int = 0,
    frame: int = 0,
) -> Figure:
    """The most likely word of each visual token after `depth` layers, written over its patch.

    The darker the patch, the more probable the word. One panel for each set of tiles that do not overlap. Arguments as
    for `plot_patches`; raises ValueError also when the lens did not read this depth or these positions.
    """
    views, over = _views(lens.tokens, sample, image, frame)
    if depth not in lens.depths:
        raise ValueError(f"the lens did not read depth {depth}: it has {', '.join(map(str, lens.depths))}")
    words = lens.table(tokenizer, sample).loc[depth]
    probability = _top_probability(lens, sample)[lens.depths.index(depth)]
    missing = {position for view in views for position in view.positions.tolist()} - set(words.index)
    if missing:
        raise ValueError(f"the lens did not read {len(missing)} of the picture's positions: read at='vision'")
    picture = np.asarray(picture)
    place = {position: index for index, position in enumerate(words.index)}
    sizes = [(CELL * view.across + 0.3, CELL * view.down + 0.3) for view in views]
    figure = Drawing(
        figsize=(min(sum(wide for wide, _ in sizes), 20) + 0.8, min(max(high for _, high in sizes), 20)),
        layout="constrained",
    )
    axes = figure.subplots(1, len(views), squeeze=False, width_ratios=[wide for wide, _ in sizes])[0]
    norm, colors = Normalize(0, 1), matplotlib.colormaps["Blues"]
    for axis, view, (wide, _) in zip(axes, views, sizes, strict=True):
        _background(axis, picture, view, over)
        index = [place[position] for position in view.positions.tolist()]
        _cells(axis, view, colors(norm(probability[index])))
        size = 7.5 * min(1.0, 20 / wide)
        for box, word, sure in zip(view.boxes, words.iloc[index], probability[index], strict=True):
            _word(axis, (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, word, sure, size)
        title = f"sample {sample}, after {depth} layers"
        axis.set_title(title if len(views) == 1 else f"{title}, {view.name}", loc="left")
        axis.set_axis_off()
    figure.colorbar(
        ScalarMappable(norm, colors), ax=list(axes), shrink=0.8, label="Probability of the word", alpha=COVER
    )
    return figure


@matplotlib.rc_context(STYLE)
def plot_lens(lens: LogitLens, tokenizer: Any, input_ids: Int[Tensor, "batch positions"], sample: int = 0) -> Figure:
    """A table of the most likely next word after each depth (up) at each position (across) that the lens read.

    Below each column stands the token that the model was given there, of visual tokens row and column. The darker a
    cell, the more probable its word. Raises ValueError when there are too many columns to read.
    """
    words = lens.table(tokenizer, sample)
    depths, width = words.shape
    if width > WIDEST:
        raise ValueError(f"the table would have {width} columns, more than {WIDEST}: read fewer positions with at=")
    probability = _top_probability(lens, sample)
    positions = lens.index[lens.index[:, 0] == sample, 1].tolist()
    figure = Drawing(figsize=(CELL * width + 1.6, 0.24 * depths + 1.0), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(probability, cmap="Blues", vmin=0, vmax=1, origin="lower", aspect="auto")
    for (row, column), word in np.ndenumerate(words.to_numpy()):
        _word(axis, column, row, word, float(probability[row, column]), 7)
    axis.set_yticks(range(depths), words.index)
    axis.set_ylabel("After layers (0: embeddings)")
    given = input_ids[sample, positions].tolist()
    axis.set_xticks(range(width), _givens(lens.tokens, tokenizer, sample, positions, given), rotation=90)
    for tick in axis.get_xticklabels():
        tick.set_parse_math(False)
    axis.set_xlabel("Token the model was given")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, label="Probability", pad=0.01)
    return figure


@dataclass(frozen=True)
class _View:
    """Visual tokens that do not overlap: their positions and boxes (left, top, right, bottom)."""

    name: str
    positions: Int[Tensor, " cells"]
    boxes: Float[np.ndarray, "cells 4"]
    across: int
    down: int


def _views(tokens: TokenMap, sample: int, image: int, frame: int) -> tuple[list[_View], bool]:
    """The views of one image or frame, and whether their boxes are pixels of the picture or just rows and columns."""
    places = tokens.require_places()
    here = (places.image[sample] == image) & (places.frame[sample] == frame) & (places.column[sample] >= 0)
    positions = here.nonzero().flatten().cpu()
    if not len(positions):
        count = int(places.image[sample].max()) + 1
        raise ValueError(f"sample {sample} has no frame {frame} of image {image}: it has {count} images, from 0")
    row, column, tile, box = (
        getattr(places, name)[sample].cpu()[positions] for name in ("row", "column", "tile", "box")
    )
    # Tokens that all stand for the whole picture are not drawn on top of each other either.
    over = bool(box.isfinite().all()) and len(box.unique(dim=0)) == len(box)
    if not over:
        box = torch.stack([column, row, column + 1, row + 1], -1).float()
    groups: list[list[int]] = []
    edges = {
        number: (box[tile == number, :2].amin(0), box[tile == number, 2:].amax(0)) for number in tile.unique().tolist()
    }
    slack = 0.5 * (box[:, 2:] - box[:, :2]).amin(0)  # tiles may share an edge, give or take a rounding

    def overlap(one: int, other: int) -> bool:
        (start, stop), (begin, end) = edges[one], edges[other]
        return bool((torch.minimum(stop, end) - torch.maximum(start, begin) > slack).all())

    for number in edges:
        room = [group for group in groups if not any(overlap(number, member) for member in group)]
        if room:
            room[0].append(number)
        else:
            groups.append([number])
    views = []
    for group in groups:
        member = torch.isin(tile, torch.tensor(group))
        name = f"tile {group[0]}" if len(group) == 1 else f"tiles {group[0]} to {group[-1]}"
        across, down = ((box[member, side].unique().numel()) for side in (0, 1))
        views.append(_View(name, positions[member], box[member].numpy(), across, down))
    return views, over


def _background(axis: Axes, picture: np.ndarray, view: _View, over: bool) -> None:
    """A pale grey picture to draw over, and limits that show all of it and all of the cells."""
    left, top = view.boxes[:, :2].min(0)
    right, bottom = view.boxes[:, 2:].max(0)
    if over:
        height, width = picture.shape[:2]
        grey = picture if picture.ndim == 2 else picture[..., :3].mean(-1)
        most = 255 if np.issubdtype(picture.dtype, np.integer) else 1
        axis.imshow(grey, cmap="gray", vmin=-most, vmax=most, extent=(0, width, height, 0))
        left, top, right, bottom = min(left, 0), min(top, 0), max(right, width), max(bottom, height)
    axis.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")


def _cells(axis: Axes, view: _View, colors: Float[np.ndarray, "cells 4"]) -> None:
    corners = view.boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
    axis.add_collection(
        PolyCollection(list(corners), facecolors=colors, alpha=COVER, edgecolors="white", linewidths=0.2)
    )


def _word(axis: Axes, x: float, y: float, word: str, probability: float, size: float) -> None:
    text = _plain(word)
    color = "white" if probability > 0.6 else "#1a1a1a"
    axis.text(x, y, text, ha="center", va="center", fontsize=size, color=color, parse_math=False, clip_on=True)


def _plain(word: str) -> str:
    """Short, with what is invisible made visible."""
    text = word.strip(" ").encode("unicode_escape").decode() if not word.isprintable() else word.strip(" ")
    text = text or "␣"
    return text if len(text) <= WORD else text[: WORD - 1] + "…"


def _givens(tokens: TokenMap, tokenizer: Any, sample: int, positions: Sequence[int], ids: list[int]) -> list[str]:
    names = []
    for position, token in zip(positions, ids, strict=True):
        if tokens.places is not None and tokens.places.column[sample, position] >= 0:
            names.append(f"{int(tokens.places.row[sample, position])}, {int(tokens.places.column[sample, position])}")
        else:
            names.append(_plain(tokenizer.decode([token])))
    return names


def _top_probability(lens: LogitLens, sample: int) -> Float[np.ndarray, "depths kept"]:
    return lens.logprobs[:, lens.index[:, 0] == sample, 0].exp().numpy()


def _group_lines(groups: Sequence[str]) -> dict[str, dict[str, Any]]:
    others = cycle(OTHER_COLORS)
    return {name: GROUP_LINES.get(name) or {"color": next(others), "marker": "v", "linestyle": "--"} for name in groups}
