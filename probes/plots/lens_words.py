"""Words of the logit lens: over the patches of an image, and as a table by depth and position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from probes.plots.cells import CELL_OPACITY, draw_background, draw_cells
from probes.plots.style import FIGURE_STYLE, NotebookFigure
from probes.tokens.tile_panels import find_tile_panels
from probes.tokens.token_map import TokenMap

if TYPE_CHECKING:
    from probes.readouts.logit_lens import LogitLens

# Limits that keep words readable: characters of a word, inches across its cell, cells across a table.
MAX_WORD_CHARACTERS, CELL_INCHES, MAX_TABLE_COLUMNS = 8, 0.62, 48


@matplotlib.rc_context(FIGURE_STYLE)
def plot_words(
    pixels: Any,
    lens: LogitLens,
    tokenizer: Any,
    depth: int,
    sample: int = 0,
    image: int = 0,
    frame: int = 0,
) -> Figure:
    """Plot the most likely word of each visual token after `depth` layers over its patch.

    A darker patch means a more probable word. There is one panel for each set of tiles that do not overlap.

    Args:
        pixels: This image or frame: a PIL image, or an array `[height, width, channels]`.
        lens: Result of `logit_lens` on a token map whose `places` are known.
        tokenizer: Tokenizer of the model, to decode token ids.
        depth: Number of layers; 0 is the embeddings.
        sample: Row of the batch.
        image: Number of the image in the sample, from 0.
        frame: Frame of a video, from 0.

    Returns:
        Figure with one panel for each set of tiles.

    Raises:
        ValueError: Places are not known, there is no such image or frame, or the lens did not read this depth or these
            positions.

    Example:
        >>> from probes import logit_lens
        >>> placed = TokenMap.from_inputs(model, inputs, processor, [image])
        >>> with torch.no_grad(), logit_lens(model, placed, at="vision") as lens:
        ...     output = model(**inputs)
        >>> figure = plot_words(image, lens, processor.tokenizer, depth=4)
    """
    panels, in_pixels = find_tile_panels(lens.tokens, sample, image, frame)
    if depth not in lens.depths:
        raise ValueError(f"the lens did not read depth {depth}: it has {', '.join(map(str, lens.depths))}")
    words = lens.table(tokenizer, sample).loc[depth]
    probability = _top_probability(lens, sample)[lens.depths.index(depth)]
    unread = {position for panel in panels for position in panel.positions.tolist()} - set(words.index)
    if unread:
        raise ValueError(
            f"the lens did not read {len(unread)} of the image's positions: open logit_lens with at='vision'"
        )
    pixels = np.asarray(pixels)
    index_of_position = {position: index for index, position in enumerate(words.index)}
    sizes = [(CELL_INCHES * panel.columns + 0.3, CELL_INCHES * panel.rows + 0.3) for panel in panels]
    figure = NotebookFigure(
        figsize=(min(sum(width for width, _ in sizes), 20) + 0.8, min(max(height for _, height in sizes), 20)),
        layout="constrained",
    )
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=[width for width, _ in sizes])[0]
    norm, colors = Normalize(0, 1), matplotlib.colormaps["Blues"]
    for axis, panel, (width, _) in zip(axes, panels, sizes, strict=True):
        draw_background(axis, pixels, panel, in_pixels)
        indices = [index_of_position[position] for position in panel.positions.tolist()]
        draw_cells(axis, panel, colors(norm(probability[indices])))
        size = 7.5 * min(1.0, 20 / width)
        for box, word, word_probability in zip(panel.boxes, words.iloc[indices], probability[indices], strict=True):
            _draw_word(axis, (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, word, word_probability, size)
        title = f"sample {sample}, after {depth} layers"
        axis.set_title(title if len(panels) == 1 else f"{title}, {panel.name}", loc="left")
        axis.set_axis_off()
    figure.colorbar(
        ScalarMappable(norm, colors), ax=list(axes), shrink=0.8, label="Probability of the word", alpha=CELL_OPACITY
    )
    return figure


@matplotlib.rc_context(FIGURE_STYLE)
def plot_lens(lens: LogitLens, tokenizer: Any, input_ids: Int[Tensor, "batch positions"], sample: int = 0) -> Figure:
    """Plot a table of the most likely next word after each depth (up) at each position (across) that the lens read.

    Below each column is the input token; for a visual token, its row and column. A darker cell means a more probable
    word.

    Args:
        lens: Result of `logit_lens`.
        tokenizer: Tokenizer of the model, to decode token ids.
        input_ids: Input tokens of the call that the lens read, `[batch, positions]`.
        sample: Row of the batch.

    Returns:
        Figure with one table.

    Raises:
        ValueError: The table would have too many columns to read.

    Example:
        >>> from probes import logit_lens
        >>> with torch.no_grad(), logit_lens(model, tokens, at="instruction") as lens:
        ...     output = model(**inputs)
        >>> figure = plot_lens(lens, processor.tokenizer, inputs["input_ids"])
    """
    words = lens.table(tokenizer, sample)
    depths, width = words.shape
    if width > MAX_TABLE_COLUMNS:
        raise ValueError(
            f"the table would have {width} columns, more than {MAX_TABLE_COLUMNS}: read fewer positions with at="
        )
    probability = _top_probability(lens, sample)
    positions = lens.index[lens.index[:, 0] == sample, 1].tolist()
    figure = NotebookFigure(figsize=(CELL_INCHES * width + 1.6, 0.24 * depths + 1.0), layout="constrained")
    axis = figure.subplots()
    cells = axis.imshow(probability, cmap="Blues", vmin=0, vmax=1, origin="lower", aspect="auto")
    for (row, column), word in np.ndenumerate(words.to_numpy()):
        _draw_word(axis, column, row, word, float(probability[row, column]), 7)
    axis.set_yticks(range(depths), words.index)
    axis.set_ylabel("Layers run (0: embeddings)")
    ids = input_ids[sample, positions].tolist()
    axis.set_xticks(range(width), _input_labels(lens.tokens, tokenizer, sample, positions, ids), rotation=90)
    for tick in axis.get_xticklabels():
        tick.set_parse_math(False)
    axis.set_xlabel("Input token")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.colorbar(cells, ax=axis, label="Probability", pad=0.01)
    return figure


def _draw_word(axis: Axes, x: float, y: float, word: str, probability: float, size: float) -> None:
    """Write a word in a colour that is readable on its cell."""
    color = "white" if probability > 0.6 else "#1a1a1a"
    text = _printable(word)
    axis.text(x, y, text, ha="center", va="center", fontsize=size, color=color, parse_math=False, clip_on=True)


def _printable(word: str) -> str:
    """Shorten a word, and escape characters that are invisible."""
    text = word.strip(" ").encode("unicode_escape").decode() if not word.isprintable() else word.strip(" ")
    text = text or "␣"
    return text if len(text) <= MAX_WORD_CHARACTERS else text[: MAX_WORD_CHARACTERS - 1] + "…"


def _input_labels(tokens: TokenMap, tokenizer: Any, sample: int, positions: Sequence[int], ids: list[int]) -> list[str]:
    """Return each input token as text, or as "row, column" for a visual token."""
    labels = []
    for position, token in zip(positions, ids, strict=True):
        if tokens.places is not None and tokens.places.column[sample, position] >= 0:
            labels.append(f"{int(tokens.places.row[sample, position])}, {int(tokens.places.column[sample, position])}")
        else:
            labels.append(_printable(tokenizer.decode([token])))
    return labels


def _top_probability(lens: LogitLens, sample: int) -> Float[np.ndarray, "depths positions"]:
    """Return the probability of the most likely word after each depth at each position that the lens read."""
    return lens.logprobs[:, lens.index[:, 0] == sample, 0].exp().numpy()
