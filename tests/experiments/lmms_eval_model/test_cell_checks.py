"""What a cell with benchmarks checks before any model is loaded. These checks need no lmms-eval."""

import os

import pytest

from experiments.config.data_schema import LmmsData
from experiments.config.schema import Config, ProbeConfig
from experiments.lmms_eval_model.benchmark_probes import check_document_probes
from experiments.lmms_eval_model.cell_benchmarks import _judge, check_benchmarks, score_lines
from experiments.records.schema import BenchmarksPart


def config(tasks=("mmvet",), **probe):
    return Config(data=LmmsData(name="lmms", tasks=list(tasks)), probe=ProbeConfig(**probe))


@pytest.mark.parametrize(("name", "value"), [("readout", True), ("controls", True), ("view_questions", 3)])
def test_check_benchmarks_with_a_probe_that_benchmarks_lack_raises_value_error_with_its_name(name, value):
    with pytest.raises(ValueError, match=rf"probe\.{name}: .*{value}"):
        check_benchmarks(config(**{name: value}))


def test_check_document_probes_of_analyses_by_layer_passes():
    names = ("attention", "contribution", "sinks", "random_control", "removal", "onset", "knockout")
    check_document_probes(ProbeConfig(**dict.fromkeys(names, True)))


def test_check_benchmarks_of_several_processes_raises_value_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"data\.tasks: .*WORLD_SIZE=2"):
        check_benchmarks(config())


def test_check_benchmarks_sets_hf_home_and_refuses_a_task_whose_judge_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match=r"OPENAI_API_KEY: .*mmvet"):
        check_benchmarks(config())
    assert os.environ["HF_HOME"] == str(tmp_path / "huggingface")


def test_judge_is_recorded_without_its_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_URL", "https://user:secret@judge.example:8443/v1?key=secret")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("MODEL_VERSION", "gpt-x")
    assert _judge(["pope"]) is None
    assert _judge(["pope", "mmvet"]) == {"address": "https://judge.example:8443/v1", "model": "gpt-x"}


def test_benchmarks_part_refuses_a_score_that_is_not_finite():
    scores = {"gqa": {"exact_match": {"value": float("nan")}}}
    task = {"scores": scores, "documents": 1, "documents_hash": "", "prompt": "", "versions": {}, "settings_hash": ""}
    task |= {"file": "a", "sha256": "b", "cost": {"flops": 1.0, "cache_bytes": 1.0, "visual_tokens": 1}}
    task["cost"]["visual_tokens_mean"] = 1.0
    part = {"lmms_eval": "0.7.3", "weights": "w", "tasks": {"gqa": task}}
    with pytest.raises(ValueError, match="nan"):
        BenchmarksPart.model_validate(part)
    scores["gqa"]["exact_match"]["value"] = 0.25
    BenchmarksPart.model_validate(part)
    assert score_lines(part) == ["gqa exact_match 0.25"]
