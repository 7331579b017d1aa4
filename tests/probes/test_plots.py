"""Figures show the measured values at the right positions, and leave matplotlib unchanged."""

from __future__ import annotations

from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize, to_hex

from probes import RemoveTokens, TokenMap, intervene, record_attention
from probes.plots import GROUP_LINES, plot_attention, plot_lens, plot_patches, plot_words
from probes.readouts.logit_lens import logit_lens
from probes.tokens.grid import Grid
from probes.tokens.places import Places
from tests.tiny_models import LAYERS

PIXELS = np.zeros((20, 40, 3), dtype=np.uint8)


class FakeTokenizer:
    def decode(self, ids):
        return f"w${ids[0]}"


def token_map_of_grids(grids, before=2, after=1):
    """Build a map of one row: text, the tokens of the grids, text."""
    count = sum(map(len, grids))
    labels = torch.full((1, before + count + after), 3)
    labels[0, before : before + count] = 2
    return TokenMap(labels, places=Places.from_grids(labels == 2, grids))


def drawn_cells(axis):
    """Return boxes and colours of the cells drawn on an axis."""
    (collection,) = [part for part in axis.collections if isinstance(part, PolyCollection)]
    corners = np.stack([path.vertices[:4] for path in collection.get_paths()])
    boxes = np.concatenate([corners.min(1), corners.max(1)], -1)
    return boxes, [to_hex(color) for color in collection.get_facecolors()]


@pytest.fixture(autouse=True)
def matplotlib_unchanged():
    """Check that pyplot holds no figure and that no setting has changed."""
    import matplotlib.pyplot as plt

    before = dict(matplotlib.rcParams)
    yield
    assert not plt.get_fignums()
    assert dict(matplotlib.rcParams) == before


def test_plot_attention_lines_are_means_of_record(make_llava, make_inputs):
    model, inputs = make_llava(), make_inputs("left")
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), record_attention(model, tokens, layers=[0, 2]) as record:
        model(**inputs)
    figure = plot_attention(record)
    axes = figure.axes
    titles = [axis.get_title(loc="left") for axis in axes]
    assert titles == ["queries: system", "queries: vision", "queries: instruction", "", "", ""], "no empty panel"
    for row, (scale, values) in enumerate([(100, record.mass), (1, record.entropy)]):
        axis = axes[3 * row + record.targets.index("instruction")]
        lines = {line.get_color(): line for line in axis.lines}
        assert len(lines) == 3
        for name in ("system", "vision", "instruction"):
            line = lines[GROUP_LINES[name]["color"]]
            cell = values[:, :, :, record.targets.index("instruction"), record.sources.index(name)].double().numpy()
            assert list(line.get_xdata()) == [0, 2]
            # The mean over heads of means over samples; undefined samples are left out.
            np.testing.assert_allclose(line.get_ydata(), scale * np.nanmean(cell, axis=(1, 2)), rtol=1e-5)
            heads = scale * np.nanmean(cell, axis=1)
            band = next(
                part.get_paths()[0].vertices
                for part in axis.collections
                if to_hex(part.get_facecolor()[0]) == GROUP_LINES[name]["color"]
            )
            for x, values_at in zip((0, 2), heads, strict=True):
                ends = sorted({*band[band[:, 0] == x][:, 1]})
                np.testing.assert_allclose(
                    [ends[0], ends[-1]], np.percentile(values_at, [10, 90]), rtol=1e-4, atol=1e-5
                )
    assert "n = 3" in figure.legends[0].get_title().get_text()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["system", "vision", "instruction"]


def test_plot_attention_with_contribution_has_a_row_for_it(make_llava, make_inputs):
    model, inputs = make_llava(), make_inputs("left")
    tokens = TokenMap.from_inputs(model, inputs)
    with (
        torch.no_grad(),
        record_attention(model, tokens, targets=["instruction"], statistics=["contribution"]) as record,
    ):
        model(**inputs)
    _, axis = plot_attention(record).axes  # mass, which is always recorded, and no entropy
    assert axis.get_ylabel() == "Contribution (norm)"
    vision = next(line for line in axis.lines if line.get_color() == GROUP_LINES["vision"]["color"])
    expected = record.contribution[:, :, :, 0, record.sources.index("vision")].double().numpy()
    np.testing.assert_allclose(vision.get_ydata(), np.nanmean(expected, axis=(1, 2)), rtol=1e-5)


@pytest.mark.filterwarnings("error")
def test_plot_attention_with_removed_source_has_gap(make_llava, make_inputs):
    model, inputs = make_llava(), make_inputs("left")
    tokens = TokenMap.from_inputs(model, inputs)
    with (
        torch.no_grad(),
        record_attention(model, tokens, targets=["instruction"]) as record,
        intervene(model, tokens, RemoveTokens("vision", layers=[1])),
    ):
        model(**inputs)
    (line,) = [line for line in record.plot().axes[0].lines if line.get_color() == GROUP_LINES["vision"]["color"]]
    assert np.isnan(line.get_ydata()).tolist() == [False, True, False]


def test_plot_attention_without_query_raises_value_error(make_llava, make_inputs):
    model, inputs = make_llava(), make_inputs("left")
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), record_attention(model, tokens, targets=["response"]) as record:
        model(**inputs)
    with pytest.raises(ValueError, match="no query of any target"):
        plot_attention(record)


def test_plot_patches_draws_cells_in_their_boxes_on_one_scale():
    tokens = token_map_of_grids([Grid(0, 2, 4, (0, 0, 40, 20))])
    values = torch.tensor([9.0, 9.0, *range(8), 9.0])
    figure = plot_patches(PIXELS, tokens, {"one": values, "half": values / 2}, label="Attention (%)")
    background, one, half, bar = (axis for axis in figure.axes if axis.axison or axis.get_title(loc="left"))
    assert [axis.get_title(loc="left") for axis in (background, one, half)] == ["sample 0", "one", "half"]
    assert bar.get_ylabel() == "Attention (%)"
    assert bar.get_ylim() == (0, 7), "text positions do not affect the scale"
    colors = matplotlib.colormaps["YlOrRd"]
    for axis, part in ((one, values), (half, values / 2)):
        boxes, drawn = drawn_cells(axis)
        expected = [(10 * (i % 4), 10 * (i // 4), 10 * (i % 4) + 10, 10 * (i // 4) + 10) for i in range(8)]
        np.testing.assert_allclose(boxes, expected)
        assert drawn == [to_hex(colors(Normalize(0, 7)(float(value)))) for value in part[2:10]]
        assert axis.get_xlim() == (0, 40)
        assert axis.get_ylim() == (20, 0), "y grows downwards"


def test_plot_patches_with_marked_positions_draws_crosses_at_their_centres():
    tokens = token_map_of_grids([Grid(0, 2, 4, (0, 0, 40, 20))])
    marked = torch.zeros(11, dtype=torch.bool)
    marked[[0, 2, 9]] = True  # a text position, the first patch and the last
    figure = plot_patches(PIXELS, tokens, {"a": torch.ones(11), "b": torch.ones(11)}, marked={"b": marked})
    first, second = (axis for axis in figure.axes if axis.get_title(loc="left") in ("a", "b"))
    assert not first.lines
    (crosses,) = second.lines
    assert crosses.get_xydata().tolist() == [[5, 5], [35, 15]]
    with pytest.raises(ValueError, match=r"marked has 'c'.*'a'"):
        plot_patches(PIXELS, tokens, {"a": torch.ones(11)}, marked={"c": marked})


def test_plot_patches_of_signed_map_is_symmetric_with_undefined_grey():
    tokens = token_map_of_grids([Grid(0, 1, 3, (0, 0, 40, 20))])
    figure = plot_patches(PIXELS, tokens, {"change": torch.tensor([0, 0, -4.0, 2.0, torch.nan, 0])})
    assert figure.axes[-1].get_ylim() == (-4, 4)
    _, drawn = drawn_cells(figure.axes[1])
    colors = matplotlib.colormaps["PuOr_r"]
    assert drawn == [to_hex(colors(0.0)), to_hex(colors(0.75)), "#a6a6a6"]


def test_plot_patches_of_overlapping_tiles_draws_panel_each():
    """Any-res: an overview that extends beyond the image, and a finer grid with newline tokens that are no patch."""
    tokens = token_map_of_grids([Grid(0, 2, 2, (0, -10, 40, 30)), Grid(0, 2, 4, (0, 0, 40, 20), tile=1, newline=True)])
    values = torch.arange(tokens.labels.shape[1])
    figure = plot_patches(PIXELS, tokens, {"a": values, "b": 2 * values})
    titles = {axis.get_title(loc="left"): axis for axis in figure.axes}
    assert {"a, tile 0", "a, tile 1", "b, tile 0", "b, tile 1"} < set(titles)
    assert len(drawn_cells(titles["a, tile 0"])[0]) == 4
    assert len(drawn_cells(titles["b, tile 1"])[0]) == 8
    assert titles["a, tile 0"].get_ylim() == (30, -10), "the part beyond the image is shown"
    assert titles["a, tile 1"].get_ylim() == (20, 0)


def test_plot_patches_of_adjacent_tiles_shares_panel():
    """SmolVLM: four quarters, then the whole image."""
    quarters = [
        Grid(0, 2, 2, (20 * c, 10 * r, 20 * c + 20, 10 * r + 10), tile=2 * r + c) for r in (0, 1) for c in (0, 1)
    ]
    tokens = token_map_of_grids([*quarters, Grid(0, 2, 2, (0, 0, 40, 20), tile=4)])
    figure = plot_patches(PIXELS, tokens, {"a": torch.ones(tokens.labels.shape[1])})
    titles = {axis.get_title(loc="left"): axis for axis in figure.axes}
    boxes, _ = drawn_cells(titles["a, tiles 0 to 3"])
    assert len({tuple(box) for box in boxes.tolist()}) == 16
    assert len(drawn_cells(titles["a, tile 4"])[0]) == 4


def test_plot_patches_without_boxes_draws_grid_beside_image():
    tokens = token_map_of_grids([Grid(0, 2, 3), Grid(0, 1, 2, tile=1)])
    figure = plot_patches(PIXELS, tokens, {"a": torch.arange(11)})
    titles = {axis.get_title(loc="left"): axis for axis in figure.axes}
    boxes, _ = drawn_cells(titles["a, tile 0"])
    assert boxes.tolist() == [[c, r, c + 1, r + 1] for r in (0, 1) for c in (0, 1, 2)]
    assert not titles["a, tile 0"].images, "the positions in the image are not known"


def test_plot_patches_of_tokens_with_shared_box_draws_grid_beside_image():
    """Each of LLaVA-Mini's queries attends to all patches."""
    tokens = token_map_of_grids([Grid(0, 2, 2, (0, 0, 40, 20), shared=True)])
    figure = plot_patches(PIXELS, tokens, {"a": torch.arange(7)})
    boxes, _ = drawn_cells(figure.axes[1])
    assert boxes.tolist() == [[0, 0, 1, 1], [1, 0, 2, 1], [0, 1, 1, 2], [1, 1, 2, 2]]


def test_plot_patches_with_image_and_frame_draws_that_frame():
    grids = [
        Grid(0, 1, 2, (0, 0, 40, 20), frame=0),
        Grid(0, 1, 2, (0, 0, 40, 20), frame=1),
        Grid(1, 1, 1, (0, 0, 9, 9)),
    ]
    tokens = token_map_of_grids(grids)
    colors = matplotlib.colormaps["YlOrRd"]
    values = torch.tensor([0, 0, 1.0, 2, 3, 4, 5, 0])
    for image, frame, expected in ((0, 0, [1, 2]), (0, 1, [3, 4]), (1, 0, [5])):
        figure = plot_patches(PIXELS, tokens, {"a": values}, image=image, frame=frame)
        _, drawn = drawn_cells(figure.axes[1])
        assert drawn == [to_hex(colors(value / max(expected))) for value in expected]
    with pytest.raises(ValueError, match=r"frame 0 of image 2.*2 images"):
        plot_patches(PIXELS, tokens, {"a": values}, image=2)


@pytest.fixture
def lens_and_ids(make_llava, make_rows):
    """A lens over two rows of different length, and the input ids."""
    model, inputs = make_llava(), make_rows([(2, 4, 3), (1, 4, 2)], "left")
    tokens = TokenMap.from_inputs(model, inputs)
    grids = [Grid(0, 2, 2, (0, 0, 40, 20)), Grid(1, 2, 2, (0, 0, 40, 20))]
    tokens = replace(tokens, places=Places.from_grids(tokens.mask("vision"), grids))
    with torch.no_grad(), logit_lens(model, tokens, top=1) as lens:
        model(**inputs)
    return lens, inputs["input_ids"]


def test_plot_words_writes_words_on_their_patches(lens_and_ids):
    lens, _ = lens_and_ids
    figure = plot_words(PIXELS, lens, FakeTokenizer(), depth=2, sample=1)
    axis = figure.axes[0]
    vision = lens.tokens.mask("vision")[1].nonzero().flatten().tolist()
    frame = lens.frame(FakeTokenizer()).query("depth == 2 and sample == 1").set_index("position")
    assert len(axis.texts) == 4
    for text, position in zip(axis.texts, vision, strict=True):
        row, column, token = frame.loc[position, ["row", "column", "token"]]
        assert text.get_text() == token
        assert text.get_position() == (20 * column + 10, 10 * row + 5)
    _, drawn = drawn_cells(axis)
    colors = matplotlib.colormaps["Blues"]
    assert drawn == [to_hex(colors(float(np.exp(frame.loc[position, "logprob"])))) for position in vision]
    with pytest.raises(ValueError, match=r"depth 7.*0, 1, 2, 3"):
        plot_words(PIXELS, lens, FakeTokenizer(), depth=7)


def test_plot_words_without_visual_positions_raises_value_error(make_llava, make_rows, lens_and_ids):
    lens, _ = lens_and_ids
    model, inputs = make_llava(), make_rows([(2, 4, 3), (1, 4, 2)], "left")
    with torch.no_grad(), logit_lens(model, lens.tokens, at="instruction") as other:
        model(**inputs)
    with pytest.raises(ValueError, match="did not read 4"):
        plot_words(PIXELS, other, FakeTokenizer(), depth=1)


def test_plot_lens_has_depths_up_and_positions_across(lens_and_ids):
    lens, input_ids = lens_and_ids
    figure = plot_lens(lens, FakeTokenizer(), input_ids, sample=1)
    axis = figure.axes[0]
    table = lens.table(FakeTokenizer(), 1)
    drawn = {text.get_position(): text.get_text() for text in axis.texts}
    for row, depth in enumerate(table.index):
        for column, position in enumerate(table.columns):
            assert drawn[column, row] == table.loc[depth, position]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == [str(depth) for depth in range(LAYERS + 1)]
    below = [tick.get_text() for tick in axis.get_xticklabels()]
    ids = input_ids[1, table.columns.tolist()].tolist()
    assert below == [f"w${ids[0]}", "0, 0", "0, 1", "1, 0", "1, 1", f"w${ids[5]}", f"w${ids[6]}"]
    rows = lens.index[:, 0] == 1
    np.testing.assert_allclose(axis.images[0].get_array(), lens.logprobs[:, rows, 0].exp(), rtol=1e-6)
    assert axis.get_ylim()[0] < axis.get_ylim()[1], "depth grows upwards"


def test_plot_lens_with_too_many_columns_raises_value_error(lens_and_ids, monkeypatch):
    lens, input_ids = lens_and_ids
    monkeypatch.setattr("probes.plots.lens_words.MAX_TABLE_COLUMNS", 8)
    with pytest.raises(ValueError, match="9 columns, more than 8"):
        plot_lens(lens, FakeTokenizer(), input_ids)


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("green", "green"),
        (" green", "green"),
        ("\n", "\\n"),
        (" ", "␣"),
        ("characteristics", "charact…"),
        ("$x$", "$x$"),
    ],
)
def test_plot_words_of_unusual_word_draws_printable_text(lens_and_ids, word, shown):
    lens, _ = lens_and_ids

    class OneWordTokenizer:
        def decode(self, ids):
            return word

    figure = plot_words(PIXELS, lens, OneWordTokenizer(), depth=0)
    assert {text.get_text() for text in figure.axes[0].texts} == {shown}
    figure.draw_without_rendering()


def test_figure_in_notebook_shows_as_png_without_pyplot(lens_and_ids):
    lens, input_ids = lens_and_ids
    figure = plot_lens(lens, FakeTokenizer(), input_ids)
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_plot_attention_drawn_under_other_style_keeps_own_style(make_llava, make_inputs):
    """Matplotlib creates ticks when it draws a figure, after the function has returned."""
    model, inputs = make_llava(), make_inputs("left")
    with torch.no_grad(), record_attention(model, TokenMap.from_inputs(model, inputs)) as record:
        model(**inputs)
    figure = plot_attention(record)
    with matplotlib.rc_context({"xtick.labelsize": 30}):
        figure.draw_without_rendering()
    assert {label.get_fontsize() for label in figure.axes[-1].get_xticklabels()} == {7.5}


def test_plot_patches_with_invalid_arguments_raises_value_error():
    tokens = token_map_of_grids([Grid(0, 2, 2)])
    for arguments, message in (
        ((replace(tokens, places=None), {"a": torch.ones(7)}), "no places of visual tokens"),
        ((tokens, {"a": torch.ones(4)}), r"map 'a'.*\[4\].*7 positions"),
        ((tokens, {}), "no map to draw"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_patches(PIXELS, *arguments)
