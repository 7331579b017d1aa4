"""Tests of the figures of a report and of their list."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.records.files import Records
from experiments.report import figures
from experiments.report.experiment_results import ExperimentResults, match_results
from experiments.report.experiment_specs import ExperimentSpec
from experiments.report.figure_entries import figure_entries
from experiments.report.figures.cost import pareto_front
from experiments.report.figures.point_labels import place_labels
from experiments.report.formatting import unit
from experiments.report.run_groups import compare_with_baselines, group_runs


def loaded(records: list[dict[str, Any]]) -> Records:
    parts = {status: tuple(r for r in records if r["status"] == status) for status in ("finished", "failed")}
    return Records(parts["finished"], parts["failed"], (), ())


def line(figure: Figure, panel: int, label: str) -> np.ndarray:
    handles, labels = figure.axes[panel].get_legend_handles_labels()
    handle = handles[labels.index(label)]
    return np.asarray((handle[0] if isinstance(handle, tuple) else handle).get_ydata(), dtype=float)


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_save_writes_png_and_pdf_reproducibly(probed: dict[str, Any], tmp_path: Path) -> None:
    png, pdf = figures.save(figures.removal_figure(probed), tmp_path / "deep" / "fig.2")
    assert (png.name, pdf.name) == ("fig.2.png", "fig.2.pdf")
    header = png.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(header[16:20], "big") == round(7.2 * 200)
    assert pdf.read_bytes()[:5] == b"%PDF-"
    before = png.read_bytes(), pdf.read_bytes()
    figures.save(figures.removal_figure(probed), tmp_path / "deep" / "fig.2")
    assert (png.read_bytes(), pdf.read_bytes()) == before


def test_attention_figure_shows_mean_control_and_uniform(probed: dict[str, Any]) -> None:
    figure = figures.attention_figure(probed)
    assert [axis.get_title("left") for axis in figure.axes] == [
        "Instruction \u2192 vision",
        "Response \u2192 vision",
        "Response \u2192 instruction",
    ]
    mass = np.array(probed["attention"]["mass"], dtype=float)
    np.testing.assert_allclose(line(figure, 1, "measured, 95% band"), 100 * np.nanmean(mass[1], axis=-1))
    np.testing.assert_allclose(line(figure, 0, "control: same model, random weights"), 60.0)
    np.testing.assert_allclose(line(figure, 2, "uniform attention"), 22.0)
    top = figure.axes[0].get_ylim()[1]
    assert top > 100 * np.nanmean(mass, axis=-1).max()


def test_entropy_figure_is_in_nats(probed: dict[str, Any]) -> None:
    figure = figures.entropy_figure(probed)
    assert figure.axes[0].get_ylabel() == "Entropy (nats)"
    np.testing.assert_allclose(line(figure, 0, "uniform attention (upper bound)"), 3.58)


def test_attention_figure_without_controls_shows_measurement_alone(probed: dict[str, Any]) -> None:
    for key in ("control", "uniform_mass"):
        del probed["attention"][key]
    probed["sinks"] = None
    assert labels(figures.attention_figure(probed)) == ["measured, 95% band"]


def test_removal_figure_shows_curves_controls_and_depth(probed: dict[str, Any]) -> None:
    figure = figures.removal_figure(probed)
    rates = [100 * run["correct"].count("1") / 120 for run in probed["removal"]["inside"]]
    np.testing.assert_allclose(line(figure, 0, "hidden inside one block"), rates)
    assert len(line(figure, 1, "hidden from a layer onward")) == 7
    np.testing.assert_allclose(line(figure, 0, "blank image"), 100 * probed["accuracy"]["blank"].count("1") / 120)
    wanted = {"control: random text tokens hidden", "intact", "text-only guess", "fusion depth 2 (95% CI 2 to 3)"}
    assert wanted <= set(labels(figure))


def test_mark_depth_marks_depth_and_interval(probed: dict[str, Any]) -> None:
    probed["fusion"]["removal"] |= {"depth": 3, "low": 2, "high": 5}
    probed["onset"] = None
    for figure, label in ((figures.removal_figure, "fusion depth 3 (95% CI 2 to 5)"), (figures.fusion_figure, None)):
        axis = figure(probed).axes[1]
        handles, names = axis.get_legend_handles_labels()
        assert list(handles[names.index(label or "fusion depth, 95% interval")].get_xdata()) == [3, 3]
        (shade,) = axis.patches
        assert (shade.get_x(), shade.get_x() + shade.get_width()) == pytest.approx((1.96, 5.04))


def test_removal_figure_blocks_of_layers_are_named_by_range(probed: dict[str, Any]) -> None:
    removal = probed["removal"]
    removal["inside"] = [{**run, "layers": [2 * i, 2 * i + 1]} for i, run in enumerate(removal["inside"][:3])]
    removal["onward"] = removal["onward"][::2]
    removal["random_inside"] = None
    probed["fusion"]["removal"] |= {"depth": None, "low": None, "high": None}
    figure = figures.removal_figure(probed)
    ticks = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert ticks == ["1\u20132", "3\u20134", "5\u20136"]
    handles, names = figure.axes[1].get_legend_handles_labels()
    assert list(handles[names.index("hidden from a layer onward")].get_xdata()) == [0, 2, 4, 6]
    assert not any("fusion depth" in label for label in labels(figure))


@pytest.mark.parametrize(("layers", "block"), [(6, 1), (30, 3), (32, 4), (32, 1), (80, 4)])
def test_removal_figure_tick_labels_do_not_overlap(probed: dict[str, Any], layers: int, block: int) -> None:
    right = probed["removal"]["inside"][0]["correct"]
    blocks = [{"layers": list(range(a, min(a + block, layers))), "correct": right} for a in range(0, layers, block)]
    onward = [{"layers": list(range(a, layers)), "correct": right} for a in (*range(0, layers, block), layers)]
    probed["removal"] |= {"inside": blocks, "onward": onward, "random_inside": None}
    figure = figures.removal_figure(probed)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    shown = [text for text in figure.axes[0].get_xticklabels() if text.get_text()]
    angle = np.radians(shown[0].get_rotation())
    places = [text.get_transform().transform(text.get_position())[0] for text in shown]
    em = shown[0].get_fontsize() * figure.dpi / 72
    # Side by side with half an em between them; slanted labels are measured across their lines of text.
    widths = [1.2 * em / np.sin(angle) if angle else text.get_window_extent(renderer).width + em / 2 for text in shown]
    assert all(there - here > width for here, there, width in zip(places, places[1:], widths, strict=False))


def test_figures_record_without_the_probe_raises(records: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="holds no attention to draw"):
        figures.attention_figure(records[0])
    with pytest.raises(ValueError, match="holds no removal of visual tokens to draw"):
        figures.removal_figure(records[0])


def test_fusion_figure_has_one_panel_for_each_curve(probed: dict[str, Any]) -> None:
    figure = figures.fusion_figure(probed)
    assert [axis.get_title("left").split(":")[0].split(",")[0] for axis in figure.axes] == [
        "Attention",
        "Removal",
        "Knock-out",
        "Read-out of the answer from the question",
    ]
    knockout, readout = figure.axes[2].lines[0], figure.axes[3].lines[0]
    depth = probed["fusion"]["knockout"]["depth"]
    assert list(line_of(figure.axes[2], "fusion depth, 95% interval").get_xdata()) == [depth + 0.5] * 2
    assert figure.axes[2].get_xlabel().endswith(f"those from layer {depth}")
    # Windows of two layers, the first and the last cut to one.
    assert list(knockout.get_xdata()) == [1, 1.5, 2.5, 3.5, 4.5, 5.5, 6]
    rates = [100 * run["correct"].count("1") / 120 for run in probed["knockout"]["windows"][1:]]
    np.testing.assert_allclose(np.asarray(knockout.get_ydata(), dtype=float), rates)
    assert list(readout.get_xdata()) == list(range(7))
    chance = [100 * run["control"].count("1") / 117 for run in probed["readout"]["depths"]]
    np.testing.assert_allclose(line(figure, 3, "control: shuffled labels"), chance)
    assert [text.get_text() for text in figure.axes[3].texts] == ["no depth"]
    probed |= {"attention": None, "removal": None, "readout": None}
    assert [axis.get_title("left").split(":")[0] for axis in figures.fusion_figure(probed).axes] == ["Knock-out"]
    probed |= {"knockout": None}
    with pytest.raises(ValueError, match="holds no curve that locates fusion"):
        figures.fusion_figure(probed)


def test_ablation_figure_marks_failed_groups_and_controls(records: list[dict[str, Any]]) -> None:
    records[-2]["status"] = records[-3]["status"] = "failed"
    figure = figures.ablation_figure(compare_with_baselines(group_runs(loaded(records))))
    assert [axis.get_title("left") for axis in figure.axes] == ["Average compressor", "Query compressor"]
    wanted = {"failed", "no pre-fusion", "2 pre-fusion layers", "LLaVA, 36 tokens", "text-only guess"}
    assert wanted | {"LLaVA, blank image"} == set(labels(figure))


def test_ablation_figures_series_differ_in_more_than_colour(records: list[dict[str, Any]]) -> None:
    for draw_cells in (figures.ablation_figure, figures.ablation_cost_figure):
        for axis in draw_cells(compare_with_baselines(group_runs(loaded(records)))).axes:
            handles, names = axis.get_legend_handles_labels()
            lines = [handle[0] if isinstance(handle, tuple) else handle for handle in handles]
            filled = [str(h.get_markerfacecolor()) == "white" for h in lines]
            looks = [(h.get_marker(), h.get_linestyle(), f) for h, f in zip(lines, filled, strict=True)]
            assert len(set(looks)) == len(set(names))


def test_legend_covers_no_data(probed: dict[str, Any]) -> None:
    figure = figures.removal_figure(probed)
    FigureCanvasAgg(figure).draw()
    box = figure.legends[0].get_window_extent()
    assert not any(box.overlaps(axis.get_tightbbox()) for axis in figure.axes)


def test_styled_leaves_matplotlib_settings_unchanged(probed: dict[str, Any]) -> None:
    before = dict(matplotlib.rcParams)
    figures.attention_figure(probed)
    assert dict(matplotlib.rcParams) == before


def test_figure_entries_without_measurements_give_the_reason(records: list[dict[str, Any]]) -> None:
    entries = list(figure_entries([], [], compare_with_baselines(group_runs(loaded(records[-1:])))))
    assert [entry.draw for entry in entries] == [None] * 7
    assert all(entry.caption.startswith("Not drawn: no finished ") for entry in entries)


def test_captions_state_sample_size_seeds_and_device(records: list[dict[str, Any]]) -> None:
    captions = {
        e.stem: e.caption
        for e in figure_entries([], [records[-1]], compare_with_baselines(group_runs(loaded(records))))
    }
    assert "n = 40 samples" in captions["attention_by_layer"]
    assert "cpu (2 threads)" in captions["attention_by_layer"]
    assert "n = 120 test examples per seed, 1 to 2 seeds per cell" in captions["ablation"]


def test_figure_entries_draw_only_the_largest_family(records: list[dict[str, Any]]) -> None:
    longer = copy.deepcopy(records[4])
    longer["config"]["train"]["max_steps"] = 400
    entries = {
        e.stem: e for e in figure_entries([], [], compare_with_baselines(group_runs(loaded([*records, longer]))))
    }
    assert "the largest of 2 groups" in entries["ablation"].caption
    draw = entries["ablation"].draw
    assert draw is not None
    assert not any("train.max_steps=400" in label for label in labels(draw()))


def test_ablation_cost_figure_shows_flops_and_cache_bytes(records: list[dict[str, Any]]) -> None:
    cells = compare_with_baselines(group_runs(loaded(records)))
    figure = figures.ablation_cost_figure(cells)
    assert [axis.get_xlabel() for axis in figure.axes] == [
        "Cost of a prompt (MFLOPs, log scale)",
        "Cost of a prompt (kbytes of keys and values, log scale)",
    ]
    for axis, name, scale in zip(figure.axes, ("flops", "cache_bytes"), (1e6, 1e3), strict=True):
        handles, names = axis.get_legend_handles_labels()
        front = np.asarray(handles[names.index("Pareto front")].get_xydata())
        points = [(getattr(c, name) / scale, 100 * c.accuracy.mean) for c in cells if c.accuracy is not None]
        best = sorted(p for p in points if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points))
        np.testing.assert_allclose(front, best)
    for record in records:
        (record.get("cost") or {}).pop("cache_bytes", None)  # older records lack it
    assert len(figures.ablation_cost_figure(compare_with_baselines(group_runs(loaded(records)))).axes) == 1


def test_pareto_front_keeps_unbeaten_points() -> None:
    points = [(3.0, 0.5), (1.0, 0.2), (1.0, 0.4), (2.0, 0.4), (4.0, 0.9), (5.0, 0.8)]
    assert pareto_front(points) == [(1.0, 0.4), (3.0, 0.5), (4.0, 0.9)]


def test_unit_picks_largest_unit_below_value() -> None:
    assert unit(2.5e9) == (1e9, "G")
    assert unit(0.5) == (1.0, "")


def match(spec: ExperimentSpec, records: list[dict[str, Any]]) -> ExperimentResults:
    study = match_results(spec, group_runs(loaded(records)))
    assert study is not None
    return study


def test_rows_figure_keeps_the_order_of_the_table(spec: ExperimentSpec, table_records: list[dict[str, Any]]) -> None:
    figure = figures.rows_figure(match(spec, table_records))
    left, right = figure.axes
    ticks = dict(zip([text.get_text() for text in left.get_yticklabels()], left.get_yticks(), strict=True))
    assert sorted(ticks, key=lambda label: -ticks[label]) == [
        *("LLaVA", "1 token / 4 tokens", "16 tokens", "64 tokens", "2 layers", "2 layers, 50% | average")
    ]
    beside = dict(zip(right.get_yticks(), [text.get_text() for text in right.get_yticklabels()], strict=True))
    assert [beside[y] for y in ticks.values()] == ["110 M", "33.4 M", "40.0 M", "not run", "74.4 M", "failed"]
    assert left.get_ylim() == right.get_ylim()
    rates = [record["accuracy"]["image"].count("1") / 1.2 for record in table_records if record["status"] == "finished"]
    container = left.containers[0]
    points = sorted(zip(*container.lines[0].get_data(), strict=True), key=lambda point: -point[1])
    means = [np.mean(rates[:3]), np.mean(rates[3:6]), np.mean(rates[6:9]), rates[9]]
    np.testing.assert_allclose([x for x, _ in points], means)
    (bars,) = container.lines[2]
    for (x, _), ((low, _), (high, _)) in zip(container.lines[0].get_xydata(), bars.get_segments(), strict=True):
        assert low < x < high
    np.testing.assert_allclose(sorted(line_of(left, "one seed").get_xdata()), sorted(rates))


def line_of(axis: Axes, label: str) -> Line2D:
    return next(line for line in axis.lines if line.get_label() == label)


def test_rows_figure_has_lines_for_first_row_and_blind_controls(
    spec: ExperimentSpec, table_records: list[dict[str, Any]]
) -> None:
    axis = figures.rows_figure(match(spec, table_records)).axes[0]
    first = np.mean([record["accuracy"]["image"].count("1") / 1.2 for record in table_records[:3]])
    blank = np.mean([record["accuracy"]["blank"].count("1") / 1.2 for record in table_records[:3]])
    guess = table_records[0]["data"]["guess"].count("1") / 1.2
    for label, value in (("LLaVA", first), ("LLaVA, blank image", blank), ("text-only guess", guess)):
        np.testing.assert_allclose(line_of(axis, label).get_xdata(), value)
    styles = {str(line_of(axis, label).get_linestyle()) for label in ("LLaVA", "LLaVA, blank image", "text-only guess")}
    assert len(styles) == 3


def test_rows_figure_long_labels_stay_inside_the_figure(
    spec: ExperimentSpec, table_records: list[dict[str, Any]], tmp_path: Path
) -> None:
    figure = figures.rows_figure(match(spec, table_records))
    figures.save(figure, tmp_path / "rows")
    FigureCanvasAgg(figure).draw()
    for axis in figure.axes:
        for label in axis.get_yticklabels():
            box = label.get_window_extent()
            assert box.x0 >= 0
            assert box.x1 <= figure.bbox.x1


def test_rows_figure_without_finished_row_raises(spec: ExperimentSpec, table_records: list[dict[str, Any]]) -> None:
    study = match(spec, table_records[10:])
    with pytest.raises(ValueError, match="no finished row of table60_mixed to draw"):
        figures.rows_figure(study)
    (entry,) = figure_entries([study], [], [])
    assert (entry.stem, entry.draw) == ("table60_mixed", None)


def test_experiment_cost_figure_shows_costs_in_which_rows_differ(
    spec: ExperimentSpec, table_records: list[dict[str, Any]]
) -> None:
    for record in table_records:
        if record["status"] == "finished":
            record["cost"] |= {"latency": record["cost"]["flops"] / 1e9, "cache_bytes": 4096}  # equal for all rows
    study = match(spec, table_records)
    figure = figures.experiment_cost_figure(study)
    assert [axis.get_xlabel() for axis in figure.axes] == [
        "Cost of a prompt (MFLOPs, log scale)",
        "Cost of a prompt (milliseconds, log scale)",
    ]
    rates = [record["accuracy"]["image"].count("1") / 1.2 for record in table_records if record["status"] == "finished"]
    means = [np.mean(rates[:3]), np.mean(rates[3:6]), np.mean(rates[6:9]), rates[9]]
    flops = [table_records[first]["cost"]["flops"] / 1e6 for first in (0, 3, 6, 9)]
    places = sorted(zip(flops, means, strict=True))
    for axis in figure.axes:
        (container,) = axis.containers
        np.testing.assert_allclose(container.lines[0].get_xydata(), places)
        assert [text.get_text() for text in axis.texts] == ["1", "2", "3", "5"]
        best = [p for p in places if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in places)]
        np.testing.assert_allclose(line_of(axis, "Pareto front").get_xydata(), best)
        guess = table_records[0]["data"]["guess"].count("1") / 1.2
        np.testing.assert_allclose(line_of(axis, "text-only guess").get_ydata(), guess)
    key = "\n".join(text.get_text() for text in figure.texts).replace("\u2007", "").split("\n")
    assert key == ["1  LLaVA", "2  1 token / 4 tokens", "3  16 tokens", "5  2 layers"]


def test_number_points_numbers_are_near_their_points_and_do_not_overlap(
    spec: ExperimentSpec, table_records: list[dict[str, Any]], tmp_path: Path
) -> None:
    study = match(spec, table_records)
    figure = figures.experiment_cost_figure(study)
    figures.save(figure, tmp_path / "cost")
    FigureCanvasAgg(figure).draw()
    for axis in figure.axes:
        boxes = [text.get_window_extent() for text in axis.texts]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        data = np.asarray(axis.containers[0].lines[0].get_xydata())
        points = axis.transData.transform(data)
        assert not any(box.contains(*point) for box in boxes for point in points)
        means = {str(row.number + 1): 100 * row.outcomes.mean() for row in study.finished_rows}
        for text, box in zip(axis.texts, boxes, strict=True):
            centre = (box.min + box.max) / 2
            nearest = np.argmin(np.hypot(*(points - centre).T))
            assert data[nearest, 1] == pytest.approx(means[text.get_text()])
    top = max(axis.get_tightbbox().y1 for axis in figure.axes)
    assert all(text.get_window_extent().y0 > top for text in figure.texts)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.floats(1, 20), st.floats(1, 20)), min_size=1, max_size=18))
def test_place_labels_avoids_bars_and_other_labels(places: list[tuple[float, float]]) -> None:
    points, box = np.array(places), np.array([21.0, 21.0])
    halves = np.tile([0.25, 0.9], (len(points), 1))
    found = place_labels(points, points, halves, box)
    assert ((found >= 0.5) & (found <= box - 0.5)).all()
    for i, text in enumerate(found):
        assert not any((np.abs(text - other) < 1 - 1e-9).all() for other in found[:i])
        assert not (np.abs(text - points) < halves + 0.5 - 1e-9).all(axis=1).any()


def test_figure_entries_equal_costs_have_no_cost_figure(
    spec: ExperimentSpec, table_records: list[dict[str, Any]]
) -> None:
    assert [entry.stem for entry in figure_entries([match(spec, table_records)], [], [])] == [
        "table60_mixed",
        "table60_mixed_cost",
    ]
    for record in table_records:
        if record["status"] == "finished":
            record["cost"] |= {"flops": 2e9, "cache_bytes": 4096}
    study = match(spec, table_records)
    assert [entry.stem for entry in figure_entries([study], [], [])] == ["table60_mixed"]
    with pytest.raises(ValueError, match="no two finished rows of table60_mixed differ in cost"):
        figures.experiment_cost_figure(study)
