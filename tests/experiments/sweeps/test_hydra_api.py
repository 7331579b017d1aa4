"""Hydra's private interface, function by function: a new Hydra that changes it fails here first."""

import logging
import sys

import pytest
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobStatus
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from experiments.sweeps import hydra_api
from tests.experiments.sweeps.run_sweep import restored_logging

SWEEPS = {
    "rows": ["experiment=table6_prefusion", "row=0,3,8", "seed=0,1", "train.max_steps=2"],
    "options": ["compressor=query,query_4", "compressor.name=average", "probe=full,none", "model.grid=null,6"],
    "added mapping": ["experiment=ablation", "+data.rounds={place:2,count:3}", "model.dtype=float32"],
    "mappings": ["data.rounds={place:2},{count:3}"],
    "option and mapping": ["data=shapes,shapes_video", "++train={max_steps: 3}", "seed=range(2)"],
}


@pytest.mark.parametrize(
    ("words", "multirun", "help_", "overrides"),
    [
        (["a=1", "b=2"], False, False, ["a=1", "b=2"]),
        (["-m", "a=1,2", "+b=2"], True, False, ["a=1,2", "+b=2"]),
        (["--multirun", "--help"], True, True, []),
    ],
)
def test_parse_command_line_separates_flags_and_overrides(monkeypatch, words, multirun, help_, overrides):
    monkeypatch.setattr(sys, "argv", ["run", *words])
    arguments = hydra_api.parse_command_line()
    assert (arguments.multirun, bool(arguments.help), arguments.overrides) == (multirun, help_, overrides)
    assert not arguments.hydra_help


def test_compose_sweep_returns_unswept_configuration_in_sweep_mode(hydra):
    sweep = hydra_api.compose_sweep(hydra, ["experiment=table6_prefusion", "seed=0,1", "train.max_steps=3"])
    assert sweep.hydra.mode == RunMode.MULTIRUN
    assert list(sweep.hydra.overrides.task) == ["experiment=table6_prefusion", "seed=0,1", "train.max_steps=3"]
    assert dict(sweep.hydra.sweeper.params) == {"row": "range(9)"}
    assert (sweep.name, sweep.seed, sweep.train.max_steps) == ("table6_prefusion", 0, 3)


@pytest.mark.parametrize("override", ["seeed=1", "model=nope", "seed=many"])
def test_compose_sweep_with_wrong_override_raises_hydra_exception(hydra, override):
    with pytest.raises(HydraException, match=r"seeed|nope|many"):
        hydra_api.compose_sweep(hydra, [override])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["seed=3"], [["seed=3"]]),
        (["seed=0,1", "tiles=1,2"], [[f"seed={s}", f"tiles={t}"] for s in (0, 1) for t in (1, 2)]),
        (["seed=range(3)"], [["seed=0"], ["seed=1"], ["seed=2"]]),
        (["compressor=query,none"], [["compressor=query"], ["compressor=none"]]),
        (["reduction.layers=[1,2],[3]"], [["reduction.layers=[1,2]"], ["reduction.layers=[3]"]]),
    ],
)
def test_split_jobs_gives_product_in_order_with_last_override_fastest(hydra, overrides, expected):
    assert hydra_api.split_jobs(hydra, hydra_api.compose_sweep(hydra, overrides)) == expected


def test_split_jobs_sweeps_rows_of_table_unless_row_is_overridden(hydra):
    table = ["experiment=table6_prefusion"]
    jobs = hydra_api.split_jobs(hydra, hydra_api.compose_sweep(hydra, table))
    assert [sorted(job) for job in jobs] == [sorted([*table, f"row={row}"]) for row in range(9)]
    jobs = hydra_api.split_jobs(hydra, hydra_api.compose_sweep(hydra, [*table, "row=4"]))
    assert [job.count("row=4") for job in jobs] == [1]


def test_parse_overrides_gives_key_and_value():
    parsed = hydra_api.parse_overrides(["train.max_steps=3", "+compressor=average", "++data.rounds={place: 2}"])
    assert [override.key_or_group for override in parsed] == ["train.max_steps", "compressor", "data.rounds"]
    assert [override.value() for override in parsed] == [3, "average", {"place": 2}]
    with pytest.raises(HydraException, match="mismatched input '='"):
        hydra_api.parse_overrides(["seed=1=2"])


@pytest.mark.parametrize("overrides", SWEEPS.values(), ids=SWEEPS)
def test_compose_job_equals_hydra_composition(hydra, overrides):
    """One cache serves all jobs; Hydra's public `compose` starts from the files each time."""
    sweep = hydra_api.compose_sweep(hydra, overrides)
    jobs = hydra_api.split_jobs(hydra, sweep)
    composed = {}
    configs = [hydra_api.compose_job(hydra, sweep, job, composed) for job in jobs]
    assert len(composed) < len(jobs) or len(jobs) == 2
    for job, config in zip(jobs, configs, strict=True):
        expected = compose("config", job)
        assert config == expected
        assert OmegaConf.get_type(config, "model") is OmegaConf.get_type(expected, "model")
        assert OmegaConf.to_yaml(config) == OmegaConf.to_yaml(expected)
    assert len({OmegaConf.to_yaml(config) for config in configs}) == len(configs) > 1


def test_compose_job_leaves_cached_composition_unchanged(hydra):
    sweep = hydra_api.compose_sweep(hydra, ["train=short"])
    composed = {}
    default = hydra_api.compose_job(hydra, sweep, ["train=short"], composed)
    changed = hydra_api.compose_job(hydra, sweep, ["train=short", "train.max_steps=3"], composed)
    assert changed.train.max_steps == 3 != default.train.max_steps
    assert hydra_api.compose_job(hydra, sweep, ["train=short"], composed) == default
    assert len(composed) == 1


seeds = []


def record_seed(config):
    """A job: note its seed, and fail for seed 1."""
    seeds.append((config.seed, HydraConfig.get().mode))
    if config.seed == 1:
        raise ValueError("seed 1")


def test_sweep_launcher_runs_each_job_and_returns_status_and_overrides(hydra, tmp_path):
    seeds.clear()
    sweep = hydra_api.compose_sweep(hydra, ["seed=0,1,2", f"results={tmp_path}", "hydra/launcher=basic"])
    jobs = hydra_api.split_jobs(hydra, sweep)
    with restored_logging():
        launcher = hydra_api.sweep_launcher(hydra, sweep, record_seed, hydra_api.Callbacks())
        returned = launcher.launch(jobs, 0)
    assert seeds == [(seed, RunMode.MULTIRUN) for seed in range(3)]
    assert [job.status for job in returned] == [JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.COMPLETED]
    assert [list(job.overrides) for job in returned] == jobs
    assert str(returned[1]._return_value) == "seed 1"


def test_configure_logging_prints_messages_of_experiments_only(hydra, capsys):
    with restored_logging():
        hydra_api.configure_logging(hydra_api.compose_sweep(hydra, []))
        logging.getLogger("experiments.any").info("shown")
        logging.getLogger("another").info("hidden")
    assert capsys.readouterr() == ("", "shown\n")
