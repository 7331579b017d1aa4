"""Rows of ablation tables: the files in conf/experiment/, and sizes scaled to a model's grid."""

from pathlib import Path

import pytest
import yaml

from experiments.config.rows import read_rows, scaled_size, size_of_tokens, token_share
from llava_mini.compressors import COMPRESSORS

FILES = sorted((Path(__file__).resolve().parents[3] / "conf" / "experiment").glob("*.yaml"))
TABLES = {path.stem: content for path in FILES if "rows" in (content := yaml.safe_load(path.read_text()))}


@pytest.mark.parametrize("experiment", TABLES)
def test_read_rows_of_shipped_table_labels_are_distinct_and_sweep_covers_all_rows(experiment):
    content = TABLES[experiment]
    rows = read_rows(experiment, content["rows"])
    assert len({row.label for row in rows}) == len(rows)
    assert content["hydra"]["sweeper"]["params"]["row"] == f"range({len(rows)})"


def test_read_rows_separates_label_paper_values_and_settings():
    (row,) = read_rows("mine", [{"label": 7, "paper": {"gqa": 62.0}, "seed": 1, "compressor.size": 2}])
    assert (row.label, row.settings, row.paper) == ("7", {"seed": 1, "compressor.size": 2}, {"gqa": 62.0})


def test_read_rows_of_nested_settings_equal_those_of_dotted_ones():
    nested = {
        "compressor": {"name": "average", "size": 2},
        "data": {"rounds": {"place": 3}},
        "reduction": {"layers": []},
    }
    dotted = {
        "compressor.name": "average",
        "compressor.size": 2,
        "data.rounds.place": 3,
        "reduction.layers": [],
    }
    paper = {"paper": {"gqa": 62.0}}
    rows = read_rows("mine", [{"label": "a", **nested, **paper}, {"label": "a", **dotted, **paper}])
    assert rows[0] == rows[1]
    assert (rows[0].settings, rows[0].paper) == (dotted, {"gqa": 62.0})


def test_read_rows_with_paper_of_null_has_no_paper_values():
    (row,) = read_rows("mine", [{"label": "a", "paper": None, "seed": 1}])
    assert (row.settings, row.paper) == ({"seed": 1}, {})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"a": 1}, "experiment mine: .*list of mappings"),
        ([{"seed": 1}], "experiment mine: .*label"),
        ([{"label": "a", "seed": 1}, {"label": "b"}], "experiment mine: .*'b'.*seed"),
        ([{"label": "a", "compressor.size": 1, "compressor": {"size": 2}}], r"'a' sets compressor\.size twice: 1, 2"),
        ([{"label": "a", "paper": 62.0}], r"experiment mine: row 'a' has paper: 62\.0"),
        ([{"label": "a", "paper": {"gqa": "62.0*"}}], r"experiment mine: row 'a' has paper: .*62\.0\*"),
    ],
    ids=["no list", "no label", "different settings", "twice", "one paper value", "paper value of no number"],
)
def test_read_rows_of_no_table_raises(rows, message):
    with pytest.raises(ValueError, match=message):
        read_rows("mine", rows)


def test_shipped_compressor_tables_have_every_compressor():
    for experiment, key in (("table10_compressors", "compressor.name"), ("table10_equal_flops", "budget.method")):
        assert set(COMPRESSORS) | {"none"} <= {row[key] for row in TABLES[experiment]["rows"]}


@pytest.mark.parametrize(
    ("grid", "resolution", "sizes", "expected"),
    [
        (24, 1, (1, 2, 4, 8, 12, 24), [1, 2, 4, 8, 12, 24]),
        (6, 1, (1, 4, 8, 12, 24), [1, 2, 3, 4, 6]),
        (24, 2, (4, 8, 12, 24), [4, 8, 12, 24]),
        (6, 2, (48,), [12]),
    ],
    ids=["paper's grid", "tiny model", "paper's grid, tiles", "tiny model, tiles"],
)
def test_scaled_size_keeps_place_on_logarithmic_scale(grid, resolution, sizes, expected):
    assert [scaled_size(grid, size, resolution) for size in sizes] == expected


def test_scaled_size_without_grid_raises():
    with pytest.raises(ValueError, match=r"model\.grid"):
        scaled_size(None, 4)


@pytest.mark.parametrize("grid", [6, 16, 24])
@pytest.mark.parametrize("tokens", [64, 128, 192, 576])
def test_size_of_tokens_is_the_least_size_with_the_share_of_patches(grid, tokens):
    size = size_of_tokens(grid, tokens)
    assert size**2 * 576 >= tokens * grid**2 > (size - 1) ** 2 * 576
    assert token_share(grid, size) == pytest.approx(size**2 / grid**2)


@pytest.mark.parametrize("scale", [size_of_tokens, token_share])
def test_scale_without_a_grid_raises(scale):
    with pytest.raises(ValueError, match=r"model\.grid: missing"):
        scale(None, 64)
