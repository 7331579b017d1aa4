"""The rows of ablation tables: every row of every experiment composes, and sizes scale as the caption says."""

from pathlib import Path

import pytest
import yaml
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config import plain as plain_module
from experiments.config import rows, schema
from experiments.sweeps import plan
from llava_mini.compressors import COMPRESSORS
from tests.experiments.conftest import required

TABLES = {
    path.stem: found
    for path in sorted((Path(__file__).resolve().parents[3] / "conf" / "experiment").glob("*.yaml"))
    if "rows" in (found := yaml.safe_load(path.read_text()))
}


@pytest.mark.parametrize("experiment", TABLES)
def test_every_row_is_a_cell_of_its_own_settings(composed, experiment):
    table = TABLES[experiment]
    for number, row in enumerate(table["rows"]):
        config = plan.choose(composed(f"experiment={experiment}", f"row={number}", *required("experiment", experiment)))
        assert isinstance(OmegaConf.to_object(config), schema.Config)
        for key, value in row.items():
            if key in ("label", "paper") or str(value).startswith("${"):
                continue
            assert OmegaConf.select(config, key) == value
    read = rows.read(experiment, table["rows"])
    assert len({row.label for row in read}) == len(read)
    assert table["hydra"]["sweeper"]["params"]["row"] == f"range({len(read)})"


def test_table_6_on_the_tiny_model(composed):
    sizes = [plan.choose(composed("experiment=table6_prefusion", f"row={row}")).compressor.size for row in range(1, 9)]
    assert sizes == [1, 2, 3, 4, 1, 1, 1, 1]


def test_rows_change_nothing_but_what_they_name(composed):
    chosen = plain_module.resolved(plan.choose(composed("experiment=table6_prefusion", "row=5")))
    plain = plain_module.resolved(plan.choose(composed("experiment=table6_prefusion")))
    assert {key for key in plain if chosen[key] != plain[key]} == {"compressor", "prefusion"}


@pytest.mark.parametrize("row", [-1, 9])
def test_an_unknown_row_is_named(composed, row):
    with pytest.raises(ValueError, match=rf"row: no row {row}; experiment table6_prefusion has rows 0 to 8"):
        plan.choose(composed("experiment=table6_prefusion", f"row={row}"))


def test_no_rows(composed):
    with pytest.raises(ValueError, match="experiment attention has no rows"):
        plan.choose(composed("experiment=attention", "row=0"))


def test_a_row_sets_only_fields_that_there_are(composed):
    config = composed("experiment=table6_prefusion", "row=0")
    for wrong in ({"label": "a", "compressor.sise": 2}, {"label": "a", "compressor.size": "many"}):
        config.rows = [wrong]
        with pytest.raises((OmegaConfBaseException, HydraException)):
            plan.choose(config)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"a": 1}, "must be a list of mappings"),
        ([{"seed": 1}], "each with a label"),
        ([{"label": "a", "seed": 1}, {"label": "b"}], "'b' differs in seed"),
    ],
)
def test_what_is_no_table(table, said):
    with pytest.raises(ValueError, match=said):
        rows.read("mine", table)


def test_scaled_sizes():
    assert [rows.scaled(24, size) for size in (1, 2, 4, 8, 12, 24)] == [1, 2, 4, 8, 12, 24]  # the paper's own
    assert [rows.scaled(6, size) for size in (1, 4, 8, 12, 24)] == [1, 2, 3, 4, 6]
    assert [rows.scaled(24, size, 2) for size in (4, 8, 12, 24)] == [4, 8, 12, 24]
    assert rows.scaled(6, 48, 2) == 12
    with pytest.raises(ValueError, match=r"model\.grid: say how many"):
        rows.scaled(None, 4)


def test_table_10_has_every_compressor():
    for experiment, key in (("table10_compressors", "compressor.name"), ("table10_equal_flops", "budget.method")):
        assert set(COMPRESSORS) | {"none"} <= {row[key] for row in TABLES[experiment]["rows"]}


def test_a_budget_sets_what_it_finds(composed):
    chosen = plan.choose(composed("model=tiny", "budget={method: average, share: 0.62, text: 14}"))
    assert chosen.compressor == {**chosen.compressor, "name": "average", "size": 3}
    with pytest.raises(ValueError, match=r"fastv cannot get down to 10.0% of LLaVA's FLOPs"):
        plan.choose(composed("model=tiny", "budget={method: fastv, share: 0.1}"))
