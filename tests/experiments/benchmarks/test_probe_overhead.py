"""Test the recording benchmark: a small run on the command line, its modes, and the ratios of its table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.benchmarks.probe_overhead import modes, run_overhead_benchmark
from experiments.benchmarks.probe_overhead.report import overhead_markdown, overhead_ratios
from experiments.config.benchmark_schema import BenchConfig, BenchModel
from experiments.config.schema import Config

ROOT = Path(__file__).resolve().parents[3]
TINY = "bench.models=[{name: tiny, heads: 2, head_width: 16, mlp: 64, layers: 2, of_layers: 4}]"


def test_command_writes_times_and_memory(tmp_path):
    command = [sys.executable, "-m", "experiments.run", "experiment=bench_probe", f"results={tmp_path}", TINY]
    sizes = ["bench.modes=[plain, text]", "bench.visual=[40]", "bench.text=8", "bench.repeats=2", "device=cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run([*command, *sizes], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    (path,) = (tmp_path / "bench").glob("*.json")
    record = json.loads(path.read_text())
    assert [row["mode"] for row in record["rows"]] == ["plain", "text"]
    for row in record["rows"]:
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) > 0
        assert row["memory"] > 0
    assert "| tiny | 40+8 | record_attention, text targets |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").stat().st_size > 1000
    assert not list((tmp_path / "bench").glob(".*")), "no temporary file is left"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["plain", "magic"], r"bench\.modes: .*'magic'.*plain, text, all"),
        (["text"], r"bench\.modes: 'plain' is missing"),
    ],
)
def test_run_overhead_benchmark_invalid_modes_raises(tmp_path, small, names, message):
    config = Config(results=str(tmp_path), device="cpu", bench=BenchConfig(names, [8], [small]))
    with pytest.raises(ValueError, match=message):
        run_overhead_benchmark(config, {})
    assert not list(tmp_path.rglob("*.json"))


@pytest.fixture(scope="module")
def small():
    return BenchModel("small", heads=2, head_width=16, mlp=32, layers=2, of_layers=4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"visual": [8, 0]}, r"bench\.visual: .*1, found 0"),
        ({"visual": []}, r"bench\.visual: .*\[\]"),
        ({"models": []}, r"bench\.models: .*\[\]"),
        ({"text": 0}, r"bench\.text: .*1, found 0"),
        ({"repeats": 0}, r"bench\.repeats: .*1, found 0"),
        ({"threads": -1}, r"bench\.threads: .*0, found -1"),
        ({"limit_gib": -1.0}, r"bench\.limit_gib: .*0, found -1"),
        ({"dtype": "foo"}, r"bench\.dtype: .*'foo'.*float32, bfloat16 or float16"),
    ],
)
def test_bench_config_invalid_field_raises(small, fields, message):
    with pytest.raises(ValueError, match=message):
        BenchConfig(**{"modes": ["plain"], "visual": [8], "models": [small]} | fields)


def test_bench_model_without_heads_raises():
    with pytest.raises(ValueError, match=r"bench\.models\.heads: .*1, found 0"):
        BenchModel("small", heads=0, head_width=16, mlp=32, layers=2, of_layers=4)


@torch.no_grad()
def test_prepare_mode_all_modes_give_same_masses(small):
    """The model that shares its weights with the modes stays unchanged."""
    model = modes.build_llama(small, 100, "float32", torch.device("cpu"))
    assert model.config.vocab_size == 50
    names = list(model.state_dict())
    ids, tokens = modes.prompt_tokens(model, 30, 10)
    masses_by_mode = {mode: modes.prepare_mode(mode, model, ids, tokens)() for mode in modes.MODES}
    assert masses_by_mode.pop("plain") is None
    for mode, masses in masses_by_mode.items():
        assert masses.shape == (2, 2, 5), mode
        torch.testing.assert_close(masses, masses_by_mode["text"], atol=1e-5, rtol=0, msg=mode)
    assert list(model.state_dict()) == names
    assert (masses_by_mode["text"][..., 2] - 30 / 40).abs().max() > 0.05, "attention is not uniform"


def test_overhead_ratios_compare_medians_with_plain_pass():
    rows = [
        {"model": "m", "visual": 8, "text": 2, "mode": "plain", "seconds": [1.0, 2.0, 4.0], "memory": 2**30},
        {"model": "m", "visual": 8, "text": 2, "mode": "text", "seconds": [3.0, 2.0, 4.4], "memory": 2**30 + 2**20},
        {"model": "m", "visual": 8, "text": 2, "mode": "hooks", "seconds": None, "memory": None},
    ]
    rows = [row | {"error": None, "matrices_gib": 12.0} for row in rows]
    model = BenchModel("m", heads=2, head_width=4, mlp=8, layers=1, of_layers=2)
    record = {
        "rows": rows,
        "bench": vars(BenchConfig(["plain", "text", "hooks"], [8], [vars(model)], text=2)),
        "provenance": {"device": "cpu"},
    }
    _, text, hooks = overhead_ratios(record)
    assert (text["time"], text["low"], text["high"]) == (1.5, 1.0, 3.0)
    assert text["extra"] == 1.0
    assert hooks["time"] is None
    page = overhead_markdown(record)
    assert "| m | 8+2 | record_attention, text targets | 1.50 (1.00 to 3.00) | 1.00 | +1 |  |" in page
    assert "not run: 12 GiB of matrices" in page


def test_attention_matrices_gib_depends_on_mode(small):
    config = BenchConfig(["plain"], [1000], [small], text=24)
    assert modes.attention_matrices_gib("all", small, config, 1000) == 0
    assert modes.attention_matrices_gib("hooks", small, config, 1000) == 3 * 2 * 1024**2 * 4 / 2**30
    assert modes.attention_matrices_gib("output_attentions", small, config, 1000) == 5 * 2 * 1024**2 * 4 / 2**30
