"""`-m` does what plain Hydra does, beyond what sweeps here add, or refuses in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments.config.registry import register_configs
from experiments.errors import one_line
from experiments.run import _is_sweep
from experiments.sweeps.hydra_api import (
    CONF,
    ConfigSource,
    compose_sweep,
    flags_first,
    has_basic_sweeper,
    open_hydra,
    parse_command_line,
    split_jobs,
)
from experiments.sweeps.plan import expand_sweep

ROOT = Path(__file__).resolve().parents[3]


def _joined(value):
    """Return a readable test id."""
    return " ".join(value) if isinstance(value, list) else str(value)


SWEEPS = [
    ["seed=2,3", "other=${seed}"],
    ["seed=range(1,4)"],
    ["seed=choice(5,7)", "name=b,c"],
    ["list=[1,2],[3]"],
    ["name='a,b'", "seed=1,2"],
    ["seed=glob(nothing*)"],
    ["other=${oc.env:HOME_OF_NOBODY,4}", "seed=1,2"],
]
REFUSED = [["--cfg", "job", "-m"], ["-m", "--info", "config"]]


@pytest.fixture(scope="module")
def plain_hydra(tmp_path_factory):
    """What a plain Hydra application without anything of ours makes of SWEEPS and REFUSED.

    One process runs all command lines, since its start takes most of the time.

    Returns:
        The overrides of the jobs of each command line, and the text of what ended it.
    """
    folder = tmp_path_factory.mktemp("application")
    (folder / "config.yaml").write_text("seed: 0\nother: 1\nlist: [1]\nname: a\nresults: r\n")
    (folder / "app.py").write_text(
        "import contextlib, io, json, sys, hydra\n"
        "from hydra.core.hydra_config import HydraConfig\n"
        "from omegaconf import OmegaConf\n"
        "jobs = []\n"
        "@hydra.main(version_base='1.3', config_path='.', config_name='config')\n"
        "def main(config):\n"
        "    jobs.append(OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False))\n"
        "outcomes = []\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    jobs, error, sys.argv[1:] = [], io.StringIO(), words\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):\n"
        "        try:\n"
        "            main()\n"
        "        except SystemExit as ended:\n"
        "            error.write(f'status {ended.code}')\n"
        "        except ValueError as refused:\n"
        "            error.write(f'{refused} status 1')\n"
        "    outcomes.append([jobs, error.getvalue()])\n"
        "print(json.dumps(outcomes))\n"
    )
    lines = [*(["-m", *overrides] for overrides in SWEEPS), *REFUSED]
    command = [sys.executable, "app.py", json.dumps(lines)]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return dict(zip(map(_joined, [*SWEEPS, *REFUSED]), json.loads(ended.stdout), strict=True))


@pytest.mark.parametrize("overrides", SWEEPS, ids=_joined)
def test_split_jobs_gives_the_jobs_of_plain_hydra(hydra, plain_hydra, overrides):
    expected, _ = plain_hydra[_joined(overrides)]
    sweep = OmegaConf.create({"hydra": {"sweeper": {"params": None}, "overrides": {"task": overrides}}})
    if not expected:  # refused there
        with pytest.raises(ValueError, match="empty sweep"):
            split_jobs(hydra, sweep)
    else:
        assert split_jobs(hydra, sweep) == expected


@pytest.mark.parametrize(
    ("arguments", "sweeps"),
    [
        (["-m", "seed=1"], True),
        (["--multirun", "seed=1"], True),
        (["seed=1", "-m", "tiles=2"], True),
        (["hydra.mode=MULTIRUN", "seed=1"], True),
        (["seed=1"], False),
        (["--cfg", "job", "-m"], False),
        (["-m", "--info", "config"], False),
        (["-m", "--help"], False),
        (["-m", "--hydra-help"], False),
    ],
    ids=_joined,
)
def test_is_sweep_tells_runs_from_what_hydra_only_shows(arguments, sweeps):
    assert _is_sweep(parse_command_line(arguments)) == sweeps


@pytest.mark.parametrize(
    "arguments",
    [
        ["seed=1", "-m", "tiles=2"],
        ["seed=1", "--config-dir", "here", "tiles=2", "-m"],
        ["--config-name=other", "seed=1", "--cfg", "job", "seed=1"],
    ],
    ids=_joined,
)
def test_flags_first_keeps_all_words_and_the_order_of_overrides(arguments):
    reordered = flags_first(arguments)
    assert sorted(reordered) == sorted(arguments)
    before, after = parse_command_line(arguments), parse_command_line(reordered)
    assert vars(before) == vars(after)
    assert reordered[len(reordered) - len(after.overrides) :] == after.overrides


@pytest.mark.parametrize("overrides", REFUSED, ids=_joined)
def test_run_with_multirun_and_a_flag_that_shows_is_refused_as_plain_hydra_does(plain_hydra, tmp_path, overrides):
    command = [sys.executable, "-m", "experiments.run", *overrides, "data.test_samples=2", f"results={tmp_path / 'r'}"]
    ours = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    jobs, plain = plain_hydra[_joined(overrides)]
    assert ours.returncode == 1
    assert plain.endswith("status 1")
    assert not jobs
    (line,) = ours.stderr.strip().splitlines()
    assert line.removeprefix("error: ") in plain
    assert not (tmp_path / "r").exists()


def test_open_hydra_with_config_dir_finds_its_experiments(tmp_path):
    register_configs()
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nname: mine\ndata: {test_samples: 6}\n")
    with open_hydra(ConfigSource(config_dir=str(tmp_path))) as hydra:
        (job,) = expand_sweep(hydra, ["experiment=mine"])[1]
    assert job.cell.config.name == "mine"
    with pytest.raises(ValueError, match=r"--config-dir.*nowhere"), open_hydra(ConfigSource(config_dir="nowhere")):
        pass


def test_config_source_from_flags_names_our_folder_by_its_path(tmp_path):
    source = ConfigSource.from_flags(parse_command_line(["-m", "--config-name", "x", "--config-dir", "d", "seed=1"]))
    assert source == ConfigSource("x", CONF, "d")
    assert Path(CONF, "config.yaml").exists()


def test_compose_sweep_with_unknown_config_name_raises(hydra):
    with pytest.raises(Exception, match="no_such") as error:
        compose_sweep(hydra, ["seed=1"], "no_such")
    assert "no_such" in one_line(error.value)


def test_has_basic_sweeper_is_false_for_another_sweeper(hydra):
    assert has_basic_sweeper(compose_sweep(hydra, ["seed=1,2"]))
    other = compose_sweep(hydra, ["seed=1,2", "hydra.sweeper._target_=hydra_plugins.other.Sweeper"])
    assert not has_basic_sweeper(other)


def test_split_jobs_of_an_empty_range_raises(hydra):
    with pytest.raises(ValueError, match=r"seed=range\(0,0\)"):
        split_jobs(hydra, compose_sweep(hydra, ["seed=range(0,0)"]))


def test_split_jobs_with_hydras_own_settings_in_a_cell_raises(hydra):
    with pytest.raises(ValueError, match=r"data\.seed=\$\{hydra:job\.num\}"):
        split_jobs(hydra, compose_sweep(hydra, ["data.seed=${hydra:job.num}", "seed=1,2"]))


def test_expand_sweep_of_several_tables_gives_all_their_rows(hydra):
    tables = ("table8_compression", "table11_prefusion_only")
    _, jobs = expand_sweep(hydra, [f"experiment={','.join(tables)}"])
    rows = {name: len(OmegaConf.load(ROOT / "conf" / "experiment" / f"{name}.yaml").rows) for name in tables}
    assert [job.cell.config.name for job in jobs] == [name for name in tables for _ in range(rows[name])]
    assert all(job.cell.row for job in jobs)


def test_expand_sweep_of_several_experiments_gives_the_jobs_of_the_sweep_that_each_brings(hydra):
    overrides = ["prefusion.layers=0,1", "data.test_samples=6"]
    _, together = expand_sweep(hydra, ["experiment=attention,ablation", *overrides])
    alone = [
        job for name in ("attention", "ablation") for job in expand_sweep(hydra, [f"experiment={name}", *overrides])[1]
    ]
    assert {job.cell.id for job in together} == {job.cell.id for job in alone}
    assert len({job.cell.id for job in together}) == 2 + 8  # ablation sweeps over four compressors
    assert together[0].cell.config.name == "attention"


@pytest.mark.parametrize(
    "option",
    [
        "hydra/job_logging=disabled",
        "hydra/job_logging=none",
        "hydra/job_logging=default",
        "hydra/hydra_logging=disabled",
    ],
)
def test_sweep_with_another_logging_group_runs(sweep, option):
    assert sweep("seed=0", option)[0] == 0
