"""Cells of a command line: table rows, FLOPs budgets, contradicting overrides, and the jobs of a sweep."""

import itertools
import re
import shutil
from pathlib import Path

import pytest
import yaml
from hydra import compose
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config.plain import to_plain
from experiments.config.schema import Config
from experiments.sweeps.hydra_api import compose_job, compose_sweep
from experiments.sweeps.plan import expand_sweep, identify_cell, is_benchmark, select_row
from tests.experiments.conftest import required_overrides

FILES = sorted((Path(__file__).resolve().parents[3] / "conf" / "experiment").glob("*.yaml"))
TABLES = {path.stem: content["rows"] for path in FILES if "rows" in (content := yaml.safe_load(path.read_text()))}
TABLE = "experiment=table6_prefusion"


@pytest.fixture(scope="module")
def compose_cached(hydra):
    """A function that composes overrides. Overrides that select the same files share one composition, to save time."""
    sweep, composed = compose_sweep(hydra, []), {}
    return lambda *overrides: compose_job(hydra, sweep, overrides, composed)


@pytest.fixture(scope="module")
def select(compose_cached):
    """A function that composes overrides and selects their row, as one run does."""
    return lambda *overrides: select_row(compose_cached(*overrides), overrides)


@pytest.mark.parametrize("experiment", TABLES)
def test_select_row_of_every_shipped_row_sets_its_settings(select, experiment):
    for number, row in enumerate(TABLES[experiment]):
        config = select(f"experiment={experiment}", f"row={number}", *required_overrides("experiment", experiment))
        assert isinstance(OmegaConf.to_object(config), Config)
        for key, value in row.items():
            if key not in ("label", "paper") and not str(value).startswith("${"):
                assert OmegaConf.select(config, key) == value


def test_select_row_scales_sizes_to_the_tiny_model(select):
    assert [select(TABLE, f"row={row}").compressor.size for row in range(1, 9)] == [1, 2, 3, 4, 1, 1, 1, 1]


def test_select_row_fills_in_settings_that_name_the_row(select):
    config = select(TABLE, "row=5", "save=models/${row}", "data.seed=${row}", "name=size-${compressor.size}")
    assert (config["save"], config.data.seed) == ("models/5", 5)
    assert config.name == f"size-{config.compressor.size}"


def test_select_row_changes_only_the_groups_that_the_row_names(select):
    row, unchanged = to_plain(select(TABLE, "row=5")), to_plain(select(TABLE, "rows=[]"))
    assert {key for key in unchanged if row[key] != unchanged[key]} == {"compressor", "prefusion"}


def test_select_row_of_a_table_without_row_raises(select):
    with pytest.raises(ValueError, match=r"row: .*table6_prefusion.*0 to 8"):
        select(TABLE)


@pytest.mark.parametrize("row", [-1, 9])
def test_select_row_out_of_range_names_row_and_range(select, row):
    with pytest.raises(ValueError, match=rf"row: .*{row}\b.*table6_prefusion.*0 to 8"):
        select(TABLE, f"row={row}")


def test_select_row_of_experiment_without_rows_names_experiment(select):
    with pytest.raises(ValueError, match=r"row: .*0.*attention"):
        select("experiment=attention", "row=0")


@pytest.mark.parametrize(
    "setting", [{"compressor.sise": 2}, {"compressor.size": "many"}], ids=["no setting", "no number"]
)
def test_select_row_with_wrong_setting_in_row_raises(compose_cached, setting):
    config = compose_cached(TABLE, "row=0")
    config.rows = [{"label": "a"} | setting]
    with pytest.raises((OmegaConfBaseException, HydraException), match=r"sise|many"):
        select_row(config)


@pytest.mark.parametrize(
    ("setting", "advice"),
    [
        ({"compressor": "query"}, r"compressor: row 0 \('a'\) .*compressor=query.*`compressor\.name: query`"),
        ({"train": "short"}, r"train: row 0 \('a'\) .*train=short.*`train\.SETTING: VALUE`"),
    ],
    ids=["method", "others"],
)
def test_select_row_with_group_option_in_row_names_row_and_setting(compose_cached, setting, advice):
    config = compose_cached(TABLE, "row=0")
    config.rows = [{"label": "a"} | setting]
    with pytest.raises(ValueError, match=advice):
        select_row(config)


def test_select_row_with_budget_sets_what_fits_it(select):
    config = select("model=tiny", "budget={method: average, share: 0.62, text_tokens: 14}")
    assert (config.compressor.name, config.compressor.size) == ("average", 3)


def test_select_row_with_budget_that_nothing_fits_raises(select):
    with pytest.raises(ValueError, match=r"budget\.share: fastv .*10\.0%"):
        select("model=tiny", "budget={method: fastv, share: 0.1}")


@pytest.mark.parametrize(
    ("overrides", "override", "row", "setting"),
    [
        (["row=1", "compressor.size=4"], "compressor.size=4", "row 1 ('1 token')", "compressor.size=1"),
        (["row=1", "++compressor.size=4"], "++compressor.size=4", "row 1 ('1 token')", "compressor.size=1"),
        (["row=1", "compressor=average"], "compressor=average", "row 1 ('1 token')", "compressor.name=query"),
        (["row=1", "compressor=none"], "compressor=none", "row 1 ('1 token')", "compressor.name=query"),
        (["row=1", "compressor=query_4"], "compressor=query_4", "row 1 ('1 token')", "compressor.size=1"),
        (["row=0", "prefusion=paper"], "prefusion=paper", "row 0 ('LLaVA')", "prefusion.layers=0"),
        (["row=5", "prefusion.layers=4"], "prefusion.layers=4", "row 5 ('1 layer')", "prefusion.layers=1"),
        (["row=2", "compressor={size: 1}"], "compressor={size: 1}", "row 2 ('16 tokens')", "compressor.size=2"),
        (
            ["row=2", "compressor={name: average, size: 2}"],
            "compressor={name: average, size: 2}",
            "row 2 ('16 tokens')",
            "compressor.name=query",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_select_row_with_contradicting_override_names_override_row_and_setting(
    select, overrides, override, row, setting
):
    with pytest.raises(ValueError, match="leave out one of the two") as error:
        select(TABLE, *overrides)
    assert str(error.value).startswith(f"{override}: {row} of table6_prefusion sets {setting};")


@pytest.mark.parametrize(
    ("overrides", "override", "setting"),
    [
        (["row=1", "compressor.size=4"], "compressor.size=4", "compressor.size=3"),
        (["row=2", "compressor.name=query"], "compressor.name=query", "compressor.name=average"),
        (["row=15", "reduction=vtw"], "reduction=vtw", "reduction.name=fastv"),
        (["row=15", "reduction.keep=0.9"], "reduction.keep=0.9", "reduction.keep="),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_select_row_with_override_that_contradicts_budget_names_override_and_setting(
    select, overrides, override, setting
):
    with pytest.raises(ValueError, match="leave out one of the two") as error:
        select("experiment=table10_equal_flops", *overrides)
    assert str(error.value).startswith(f"{override}: the FLOPs budget of table10_equal_flops sets {setting}")


@pytest.mark.parametrize(
    ("overrides", "key", "found"),
    [
        (["row=1", "prefusion.layers=4"], "prefusion.layers", "4"),
        (["row=15", "prefusion=inside", "prefusion.layers=2"], "prefusion.layers", "2"),
        (["row=15", "compressor=query"], "compressor.name", "query"),
        (["row=1", "reduction=vtw"], "reduction.name", "vtw"),
        (["row=1", "tiles=2"], "tiles", "2"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_select_row_with_cost_that_the_budget_does_not_count_names_setting_and_value(select, overrides, key, found):
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}: .*budget\.method=.* found {found};"):
        select("experiment=table10_equal_flops", *overrides)


def test_select_row_without_budget_takes_pre_fusion_layers(select):
    assert select("experiment=table10_equal_flops", "row=0", "prefusion.layers=4").prefusion.layers == 4


def test_select_row_with_contradicting_budget_method_names_row(select):
    with pytest.raises(ValueError, match=r"budget\.method=vtw: row 1 \('query'\).* sets budget\.method=query"):
        select("experiment=table10_equal_flops", "row=1", "budget.method=vtw")


@pytest.mark.parametrize(
    ("overrides", "settings"),
    [
        (["train.max_steps=7", "compressor.size=1"], {"train.max_steps": 7, "compressor.size": 1}),
        (["compressor=query"], {"compressor.name": "query", "compressor.size": 1}),
        (["compressor={attention: bare}"], {"compressor.name": "query", "compressor.attention": "bare"}),
        (["compressor={name: query, size: 1}"], {"compressor.name": "query", "compressor.size": 1}),
        (["compressor.attention=bare"], {"compressor.attention": "bare", "compressor.size": 1}),
        (["prefusion.init=fresh", "seed=3"], {"prefusion.init": "fresh", "prefusion.layers": 0, "seed": 3}),
        (["train=tiny"], {"compressor.name": "query"}),
        (["tiles=2"], {"tiles": 2}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_select_row_with_override_that_agrees_is_accepted(select, overrides, settings):
    config = select(TABLE, "row=1", *overrides)
    assert {key: OmegaConf.select(config, key) for key in settings} == settings


def test_select_row_with_group_option_equal_to_row_is_accepted(select):
    assert select(TABLE, "row=8", "prefusion=paper").prefusion.layers == 4


def test_select_row_with_override_equal_to_budget_is_accepted(select):
    config = select("experiment=table10_equal_flops", "row=1", "compressor.size=3", "train.max_steps=7")
    assert (config.compressor.size, config.train.max_steps) == (3, 7)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([TABLE, "compressor=average"], r"compressor=average: row 0 \('LLaVA'\).* sets compressor\.name=none"),
        (
            [TABLE, "row=1,2", "compressor.size=1"],
            r"compressor\.size=1: row 2 \('16 tokens'\).* sets compressor\.size=2",
        ),
        ([TABLE, "row=8,5", "prefusion=paper"], r"prefusion=paper: row 5 \('1 layer'\).* sets prefusion\.layers=1"),
        (
            ["experiment=table10_equal_flops", "row=1,2", "compressor.size=4"],
            r"compressor\.size=4: the FLOPs budget .* sets compressor\.size=3",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_expand_sweep_with_override_that_one_row_contradicts_raises(hydra, overrides, message):
    with pytest.raises(ValueError, match=message):
        expand_sweep(hydra, overrides)


def test_expand_sweep_with_overrides_that_agree_gives_one_cell_a_row(hydra):
    _, jobs = expand_sweep(hydra, [TABLE, "row=1,5", "train.max_steps=7,8", "compressor.size=1"])
    assert [(job.cell.row, job.cell.config.train.max_steps) for job in jobs] == [
        ("1 token", 7),
        ("1 token", 8),
        ("1 layer", 7),
        ("1 layer", 8),
    ]
    assert jobs[0].name == "1 token, train.max_steps=7"


def test_expand_sweep_names_jobs_by_row_and_by_overrides_that_differ(hydra):
    _, (single,) = expand_sweep(hydra, ["seed=3"])
    assert single.name == single.cell.label
    _, jobs = expand_sweep(hydra, ["seed=0,1", "tiles=2"])
    assert [job.name for job in jobs] == ["seed=0", "seed=1"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=table6_prefusion", "row=0,3,8", "seed=0,1", "train.max_steps=2"],
        ["compressor=query,query_4", "compressor.name=average", "probe=full,none", "model.grid=null,6"],
        ["experiment=ablation", "+data.rounds={place:2,count:3}", "model.dtype=float32"],
        ["data.rounds={place:2},{count:3}"],
    ],
)
def test_expand_sweep_gives_cells_of_jobs_that_hydra_composes_itself(hydra, overrides):
    _, jobs = expand_sweep(hydra, overrides)
    assert len({job.cell.id for job in jobs}) == len(jobs) > 1
    for job in jobs:
        cell = identify_cell(compose("config", job.overrides), job.overrides)
        assert (cell.id, cell.resolved, cell.row) == (job.cell.id, job.cell.resolved, job.cell.row)


def test_expand_sweep_of_benchmark_has_no_cell(hydra):
    _, (job,) = expand_sweep(hydra, ["experiment=cost"])
    assert (job.cell, job.name) == (None, "cost")


def test_is_benchmark_for_cell_and_benchmarks(compose_cached):
    assert not is_benchmark(compose_cached(TABLE))
    assert is_benchmark(compose_cached("experiment=cost"))
    assert is_benchmark(compose_cached("experiment=bench_probe"))


def test_identity_of_a_cell_changes_with_the_files_that_its_weights_come_from(compose_cached, tmp_path):
    """A second training into the same folder must not get the record or the checkpoints of the first."""
    shutil.copytree("experiments/assets/tiny", tmp_path / "model")
    shutil.copytree("experiments/assets/smol_grids", tmp_path / "adapter")
    weights = tmp_path / "prefusion.safetensors"
    weights.write_bytes(b"first")
    given = [f"model.path={tmp_path}/model", f"train.lora_init={tmp_path}/adapter", f"prefusion.init={weights}"]
    overrides = ["model=checkpoint", "model.name=mine", *given, "train.lora_rank=128", "prefusion.layers=1"]

    def identity():
        cell = identify_cell(compose_cached(*overrides, "data.test_samples=1"), overrides)
        files.append(cell.model_files)
        return cell.id

    files = []
    seen = [identity(), identity()]
    assert seen[0] == seen[1]
    for changed in (tmp_path / "model/model.safetensors", tmp_path / "adapter/adapter_model.safetensors", weights):
        changed.write_bytes(b"second")
        seen.append(identity())
    assert len(set(seen)) == 4
    settings = ["model.path", "train.lora_init", "prefusion.init"]
    assert list(files[0]) == settings
    changed = [{key for key in settings if a[key] != b[key]} for a, b in itertools.pairwise(files)]
    assert changed == [set(), {"model.path"}, {"train.lora_init"}, {"prefusion.init"}]


def test_cell_of_a_hub_model_names_no_files(compose_cached):
    overrides = ["model=llava-1.5-7b"]
    assert identify_cell(compose_cached(*overrides, "data.test_samples=1"), overrides).model_files == {}
