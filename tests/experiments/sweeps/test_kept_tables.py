"""Tables of a user's own configuration folder: a run keeps their rows, and the report shows them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from experiments.config.registry import register_configs
from experiments.report.experiment_specs import SPEC_FOLDER, load_all_specs, load_specs
from experiments.sweeps.hydra_api import open_hydra
from experiments.sweeps.kept_tables import KeptTable, table_of
from experiments.sweeps.plan import expand_sweep

MINE = """# @package _global_
# Do my layers help? A second sentence.
{name}rows:
  - {{label: plain, prefusion.layers: 0, compressor.size: "${{scaled:${{model.grid}},4}}"}}
  - {{label: fused, prefusion.layers: 2, compressor.size: 1}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A configuration folder with a table `mine`, one without a name, one that inherits rows, and another Table 8."""
    experiments = tmp_path / "conf" / "experiment"
    experiments.mkdir(parents=True)
    (experiments / "mine.yaml").write_text(MINE.format(name="name: mine\n"))
    (experiments / "nameless.yaml").write_text(MINE.format(name=""))
    (experiments / "other.yaml").write_text(MINE.format(name="name: another_name\n"))
    (experiments / "table8_compression.yaml").write_text(MINE.format(name="name: table8_compression\n"))
    (experiments / "heir.yaml").write_text("# @package _global_\n# An heir.\ndefaults: [mine]\nname: heir\n")
    (experiments / "slash.yaml").write_text(MINE.format(name="name: a/b\n"))
    return tmp_path / "conf"


def swept_tables(*overrides: str) -> list[KeptTable | None]:
    register_configs()
    with open_hydra() as hydra:
        return [job.table for job in expand_sweep(hydra, overrides)[1]]


@pytest.mark.parametrize(
    ("experiment", "name", "title"),
    [
        ("mine", "mine", "Do my layers help?"),
        ("nameless", "nameless", "Do my layers help?"),
        ("other", "another_name", "Do my layers help?"),
        ("table8_compression", "table8_compression", "Do my layers help?"),
        ("heir", "heir", "An heir."),
    ],
)
def test_table_of_a_folder_of_ones_own_is_kept_and_read_back(
    experiment: str, name: str, title: str, folder: Path, tmp_path: Path
) -> None:
    source = [f"hydra.searchpath=[file://{folder}]"] if experiment != "table8_compression" else []
    if source:
        (table, again) = swept_tables(f"experiment={experiment}", "row=0,1", *source)
    else:  # the project's file of this name comes first on Hydra's search path
        rows = OmegaConf.load(folder / "experiment" / f"{experiment}.yaml").rows
        config = OmegaConf.create({"name": name, "row": 0, "rows": rows})
        sources = [OmegaConf.create({"schema": "file", "path": str(folder)})]
        table = again = table_of(config, [f"experiment={experiment}"], sources)
    assert table == again
    assert table is not None
    table.keep(tmp_path / "results")
    (spec,) = load_specs(tmp_path / "results" / "experiments")
    assert (spec.name, spec.title) == (name, title)
    on_this_grid = [row.values["compressor.size"] for row in spec.resolve_rows({"model.grid": 24})]
    assert on_this_grid == [4, 1]
    shipped = {spec.name for spec in load_specs(SPEC_FOLDER)}
    everything = {spec.name: spec for spec in load_all_specs(tmp_path / "results")}
    assert everything.keys() == shipped | {name}
    assert everything[name].rows == spec.rows


@pytest.mark.parametrize("overrides", [["experiment=table8_compression", "row=0,1"], ["experiment=table6_prefusion"]])
def test_table_of_the_project_is_not_kept(overrides: list[str], tmp_path: Path) -> None:
    for table in swept_tables(*overrides):
        assert table is not None
        assert table.text is None
        table.keep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_keep_removes_rows_that_are_now_those_of_the_project(tmp_path: Path) -> None:
    KeptTable("table8_compression", "name: table8_compression\n").keep(tmp_path)
    assert (tmp_path / "experiments" / "table8_compression.yaml").is_file()
    KeptTable("table8_compression", None).keep(tmp_path)
    assert not (tmp_path / "experiments" / "table8_compression.yaml").exists()


def test_table_of_a_cell_outside_a_table_is_none() -> None:
    assert swept_tables("experiment=ablation", "compressor=none", "prefusion.layers=0") == [None]


def test_table_of_name_with_slash_raises(folder: Path) -> None:
    with pytest.raises(ValueError, match="name: 'a/b'"):
        swept_tables("experiment=slash", "row=0,1", f"hydra.searchpath=[file://{folder}]")


def test_table_of_rows_on_the_command_line_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_LAYERS", "2")
    rows = "rows=[{label: a, prefusion.layers: 0}, {label: b, prefusion.layers: '${oc.env:MY_LAYERS}'}]"
    register_configs()
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("config", ["name=typed", "row=1", rows])
    table = table_of(config, ["name=typed", "row=1", rows], [])
    assert table is not None
    assert table.name == "typed"
    assert table.text is not None
    assert "MY_LAYERS" not in table.text  # the report may run where the variable is not set


def test_nested_and_dotted_rows_are_the_same_cells_and_the_same_table(tmp_path: Path) -> None:
    nested = "rows=[{label: a, compressor: {name: query, size: 1}}, {label: b, compressor: {name: average, size: 2}}]"
    dotted = (
        "rows=[{label: a, compressor.name: query, compressor.size: 1},"
        "{label: b, compressor.name: average, compressor.size: 2}]"
    )
    register_configs()
    ids, specs = [], []
    with open_hydra() as hydra:
        for rows in (nested, dotted):
            jobs = expand_sweep(hydra, [rows, "name=mine", "row=0,1", "model=tiny", "data.test_samples=2"])[1]
            ids.append([job.cell.id for job in jobs if job.cell])
            assert jobs[0].table is not None
            jobs[0].table.keep(tmp_path)
            specs.extend(load_specs(tmp_path / "experiments"))
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 2
    assert [spec.setting_keys for spec in specs] == [("compressor.name", "compressor.size")] * 2
    assert specs[0].rows == specs[1].rows
