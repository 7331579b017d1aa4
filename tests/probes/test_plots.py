"""Figures hold what the probes measured, at the right place, and leave matplotlib as it was."""

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
from probes.tokens.grid import Grid, Places

from .conftest import LAYERS

PICTURE = np.zeros((20, 40, 3), dtype=np.uint8)


class Words:
    def decode(self, ids):
        return f"w${ids[0]}"


def by_hand(grids, before=2, after=1):
    """One row: text, the tokens of the grids, text."""
    count = sum(map(len, grids))
    labels = torch.full((1, before + count + after), 3)
    labels[0, before : before + count] = 2
    return TokenMap(labels, places=Places.lay_out(labels == 2, grids))


def cells(axis):
    """Boxes and colours of the cells drawn on an axis."""
    (collection,) = [part for part in axis.collections if isinstance(part, PolyCollection)]
    corners = np.stack([path.vertices[:4] for path in collection.get_paths()])
    boxes = np.concatenate([corners.min(1), corners.max(1)], -1)
    return boxes, [to_hex(color) for color in collection.get_facecolors()]


@pytest.fixture(autouse=True)
def untouched():
    """No figure left with pyplot, no setting changed."""
    import matplotlib.pyplot as plt

    before = dict(matplotlib.rcParams)
    yield
    assert not plt.get_fignums()
    assert dict(matplotlib.rcParams) == before


def test_attention_lines_are_means_of_the_record(make_llava, make_inputs):
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
            # Of means over samples, the mean over heads: undefined samples are left out.
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


@pytest.mark.filterwarnings("error")
def test_a_layer_that_cannot_see_the_source_is_a_gap(make_llava, make_inputs):
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


def test_attention_with_no_query_is_refused(make_llava, make_inputs):
    model, inputs = make_llava(), make_inputs("left")
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), record_attention(model, tokens, targets=["response"]) as record:
        model(**inputs)
    with pytest.raises(ValueError, match="no query of any target"):
        plot_attention(record)


def test_patches_lie_where_they_belong_on_one_scale():
    tokens = by_hand([Grid(0, 2, 4, (0, 0, 40, 20))])
    values = torch.tensor([9.0, 9.0, *range(8), 9.0])
    figure = plot_patches(PICTURE, tokens, {"one": values, "half": values / 2}, label="Attention (%)")
    picture, one, half, bar = (axis for axis in figure.axes if axis.axison or axis.get_title(loc="left"))
    assert [axis.get_title(loc="left") for axis in (picture, one, half)] == ["sample 0", "one", "half"]
    assert bar.get_ylabel() == "Attention (%)"
    assert bar.get_ylim() == (0, 7), "text positions do not count"
    colors = matplotlib.colormaps["YlOrRd"]
    for axis, part in ((one, values), (half, values / 2)):
        boxes, drawn = cells(axis)
        wanted = [(10 * (i % 4), 10 * (i // 4), 10 * (i % 4) + 10, 10 * (i // 4) + 10) for i in range(8)]
        np.testing.assert_allclose(boxes, wanted)
        assert drawn == [to_hex(colors(Normalize(0, 7)(float(value)))) for value in part[2:10]]
        assert axis.get_xlim() == (0, 40)
        assert axis.get_ylim() == (20, 0), "downwards"


def test_signed_maps_are_symmetric_and_undefined_cells_grey():
    tokens = by_hand([Grid(0, 1, 3, (0, 0, 40, 20))])
    figure = plot_patches(PICTURE, tokens, {"change": torch.tensor([0, 0, -4.0, 2.0, torch.nan, 0])})
    assert figure.axes[-1].get_ylim() == (-4, 4)
    _, drawn = cells(figure.axes[1])
    colors = matplotlib.colormaps["PuOr_r"]
    assert drawn == [to_hex(colors(0.0)), to_hex(colors(0.75)), "#a6a6a6"]


def test_overview_and_details_get_a_panel_each():
    """Any-res: an overview that reaches beyond the picture, and a finer grid with row ends that are no patch."""
    tokens = by_hand([Grid(0, 2, 2, (0, -10, 40, 30)), Grid(0, 2, 4, (0, 0, 40, 20), tile=1, newline=True)])
    values = torch.arange(tokens.labels.shape[1])
    figure = plot_patches(PICTURE, tokens, {"a": values, "b": 2 * values})
    titles = {axis.get_title(loc="left"): axis for axis in figure.axes}
    assert {"a, tile 0", "a, tile 1", "b, tile 0", "b, tile 1"} < set(titles)
    assert len(cells(titles["a, tile 0"])[0]) == 4
    assert len(cells(titles["b, tile 1"])[0]) == 8
    assert titles["a, tile 0"].get_ylim() == (30, -10), "what reaches beyond the picture is shown"
    assert titles["a, tile 1"].get_ylim() == (20, 0)


def test_tiles_side_by_side_share_a_panel():
    """SmolVLM: four quarters, then the whole."""
    quarters = [
        Grid(0, 2, 2, (20 * c, 10 * r, 20 * c + 20, 10 * r + 10), tile=2 * r + c) for r in (0, 1) for c in (0, 1)
    ]
    tokens = by_hand([*quarters, Grid(0, 2, 2, (0, 0, 40, 20), tile=4)])
    figure = plot_patches(PICTURE, tokens, {"a": torch.ones(tokens.labels.shape[1])})
    titles = {axis.get_title(loc="left"): axis for axis in figure.axes}
    boxes, _ = cells(titles["a, tiles 0 to 3"])
    assert len({tuple(box) for box in boxes.tolist()}) == 16
    assert len(cells(titles["a, tile 4"])[0]) == 4


def test_without_boxes_the_grid_stands_beside_the_picture():
    tokens = by_hand([Grid(0, 2, 3), Grid(0, 1, 2, tile=1)])
    figure = plot_patches(PICTURE, tokens, {"a": torch.arange(11)})
    titles = {axis.get_title(loc="left"): axis for axis in figure.axes}
    boxes, _ = cells(titles["a, tile 0"])
    assert boxes.tolist() == [[c, r, c + 1, r + 1] for r in (0, 1) for c in (0, 1, 2)]
    assert not titles["a, tile 0"].images, "nothing says where in the picture they lie"


def test_tokens_that_share_a_box_stand_beside_the_picture():
    """LLaVA-Mini's queries each attend to all patches."""
    tokens = by_hand([Grid(0, 2, 2, (0, 0, 40, 20), shared=True)])
    figure = plot_patches(PICTURE, tokens, {"a": torch.arange(7)})
    boxes, _ = cells(figure.axes[1])
    assert boxes.tolist() == [[0, 0, 1, 1], [1, 0, 2, 1], [0, 1, 1, 2], [1, 1, 2, 2]]


def test_one_of_several_pictures_and_frames():
    grids = [
        Grid(0, 1, 2, (0, 0, 40, 20), frame=0),
        Grid(0, 1, 2, (0, 0, 40, 20), frame=1),
        Grid(1, 1, 1, (0, 0, 9, 9)),
    ]
    tokens = by_hand(grids)
    colors = matplotlib.colormaps["YlOrRd"]
    values = torch.tensor([0, 0, 1.0, 2, 3, 4, 5, 0])
    for image, frame, wanted in ((0, 0, [1, 2]), (0, 1, [3, 4]), (1, 0, [5])):
        figure = plot_patches(PICTURE, tokens, {"a": values}, image=image, frame=frame)
        _, drawn = cells(figure.axes[1])
        assert drawn == [to_hex(colors(value / max(wanted))) for value in wanted]
    with pytest.raises(ValueError, match="no frame 0 of image 2: it has 2 images"):
        plot_patches(PICTURE, tokens, {"a": values}, image=2)


@pytest.fixture
def read(make_llava, make_rows):
    """A lens over two rows of different length, and what the model was given."""
    model, inputs = make_llava(), make_rows([(2, 4, 3), (1, 4, 2)], "left")
    tokens = TokenMap.from_inputs(model, inputs)
    grids = [Grid(0, 2, 2, (0, 0, 40, 20)), Grid(1, 2, 2, (0, 0, 40, 20))]
    tokens = replace(tokens, places=Places.lay_out(tokens.mask("vision"), grids))
    with torch.no_grad(), logit_lens(model, tokens, top=1) as lens:
        model(**inputs)
    return lens, inputs["input_ids"]


def test_words_stand_on_their_patches(read):
    lens, _ = read
    figure = plot_words(PICTURE, lens, Words(), depth=2, sample=1)
    axis = figure.axes[0]
    vision = lens.tokens.mask("vision")[1].nonzero().flatten().tolist()
    frame = lens.frame(Words()).query("depth == 2 and sample == 1").set_index("position")
    assert len(axis.texts) == 4
    for text, position in zip(axis.texts, vision, strict=True):
        row, column, token = frame.loc[position, ["row", "column", "token"]]
        assert text.get_text() == token
        assert text.get_position() == (20 * column + 10, 10 * row + 5)
    _, drawn = cells(axis)
    colors = matplotlib.colormaps["Blues"]
    assert drawn == [to_hex(colors(float(np.exp(frame.loc[position, "logprob"])))) for position in vision]
    with pytest.raises(ValueError, match="did not read depth 7: it has 0, 1, 2, 3"):
        plot_words(PICTURE, lens, Words(), depth=7)


def test_words_need_the_visual_positions(make_llava, make_rows, read):
    lens, _ = read
    model, inputs = make_llava(), make_rows([(2, 4, 3), (1, 4, 2)], "left")
    with torch.no_grad(), logit_lens(model, lens.tokens, at="instruction") as other:
        model(**inputs)
    with pytest.raises(ValueError, match="did not read 4 of the picture's positions"):
        plot_words(PICTURE, other, Words(), depth=1)


def test_lens_table_has_depths_up_and_positions_across(read):
    lens, input_ids = read
    figure = plot_lens(lens, Words(), input_ids, sample=1)
    axis = figure.axes[0]
    table = lens.table(Words(), 1)
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


def test_tables_too_wide_to_read_are_refused(read, monkeypatch):
    lens, input_ids = read
    monkeypatch.setattr("probes.plots.WIDEST", 8)
    with pytest.raises(ValueError, match="would have 9 columns, more than 8: read fewer positions"):
        plot_lens(lens, Words(), input_ids)


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
def test_every_word_can_be_drawn(read, word, shown):
    lens, _ = read

    class One:
        def decode(self, ids):
            return word

    figure = plot_words(PICTURE, lens, One(), depth=0)
    assert {text.get_text() for text in figure.axes[0].texts} == {shown}
    figure.draw_without_rendering()


def test_a_notebook_shows_the_figure_without_pyplot(read):
    lens, input_ids = read
    figure = plot_lens(lens, Words(), input_ids)
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_drawn_later_it_keeps_its_style(make_llava, make_inputs):
    """Ticks are made when a figure is drawn, long after the function has returned."""
    model, inputs = make_llava(), make_inputs("left")
    with torch.no_grad(), record_attention(model, TokenMap.from_inputs(model, inputs)) as record:
        model(**inputs)
    figure = plot_attention(record)
    with matplotlib.rc_context({"xtick.labelsize": 30}):
        figure.draw_without_rendering()
    assert {label.get_fontsize() for label in figure.axes[-1].get_xticklabels()} == {7.5}


def test_wrong_use_is_one_clear_line():
    tokens = by_hand([Grid(0, 2, 2)])
    for arguments, message in (
        ((replace(tokens, places=None), {"a": torch.ones(7)}), "no places of visual tokens for a map made by hand"),
        ((tokens, {"a": torch.ones(4)}), r"map 'a' has shape \[4\]: one value for each of 7 positions"),
        ((tokens, {}), "no map to draw"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_patches(PICTURE, *arguments)
