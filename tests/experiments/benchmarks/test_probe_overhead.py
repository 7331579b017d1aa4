"""The benchmark of recording: a small run of every mode through the command line, and the sums behind its table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.benchmarks.probe_overhead import modes, run_bench
from experiments.benchmarks.probe_overhead.report import ratios, table
from experiments.config.schema import BenchConfig, BenchModel, Config

ROOT = Path(__file__).resolve().parents[3]
TINY = "bench.models=[{name: tiny, heads: 2, head_width: 16, mlp: 64, layers: 2, of_layers: 4}]"


def test_the_command_measures_times_and_memory(tmp_path):
    command = [sys.executable, "-m", "experiments.run", "experiment=bench_probe", f"results={tmp_path}", TINY]
    sizes = ["bench.modes=[plain, text]", "bench.visual=[40]", "bench.text=8", "bench.repeats=2", "device=cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*command, *sizes], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    (path,) = (tmp_path / "bench").glob("*.json")
    record = json.loads(path.read_text())
    assert [row["mode"] for row in record["rows"]] == ["plain", "text"]
    for row in record["rows"]:
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) > 0
        assert row["memory"] > 0
    assert "| tiny | 40+8 | record_attention, text targets |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").stat().st_size > 1000
    assert not list((tmp_path / "bench").glob(".*")), "nothing half written is left"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["plain", "magic"], "bench.modes: no 'magic'; there are plain, text, all"),
        (["text"], "bench.modes: 'plain' is missing"),
    ],
)
def test_bad_modes_are_refused(tmp_path, names, said):
    config = Config(results=str(tmp_path), device="cpu", bench=BenchConfig(names, [8], []))
    with pytest.raises(ValueError, match=said):
        run_bench(config, {})
    assert not list(tmp_path.rglob("*.json"))


@pytest.fixture(scope="module")
def small():
    return BenchModel("small", heads=2, head_width=16, mlp=32, layers=2, of_layers=4)


@torch.no_grad()
def test_every_mode_finds_the_same_masses(small):
    """And leaves the model that it shares its weights with as it was."""
    model = modes.build(small, 100, "float32", torch.device("cpu"))
    assert model.config.vocab_size == 50
    names = list(model.state_dict())
    ids, tokens = modes.inputs(model, 30, 10)
    found = {mode: modes.prepare(mode, model, ids, tokens)() for mode in modes.MODES}
    assert found.pop("plain") is None
    for mode, masses in found.items():
        assert masses.shape == (2, 2, 5), mode
        torch.testing.assert_close(masses, found["text"], atol=1e-5, rtol=0, msg=mode)
    assert list(model.state_dict()) == names
    assert (found["text"][..., 2] - 30 / 40).abs().max() > 0.05, "attention is not uniform"


def test_ratios_of_medians():
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
    _, text, hooks = ratios(record)
    assert (text["time"], text["low"], text["high"]) == (1.5, 1.0, 3.0)
    assert text["extra"] == 1.0
    assert hooks["time"] is None
    written = table(record)
    assert "| m | 8+2 | record_attention, text targets | 1.50 (1.00 to 3.00) | 1.00 | +1 |  |" in written
    assert "not run: 12 GiB of matrices" in written


def test_matrices_that_a_mode_holds(small):
    config = BenchConfig(["plain"], [1000], [small], text=24)
    assert modes.matrices("all", small, config, 1000) == 0
    assert modes.matrices("hooks", small, config, 1000) == 3 * 2 * 1024**2 * 4 / 2**30
    assert modes.matrices("output_attentions", small, config, 1000) == 5 * 2 * 1024**2 * 4 / 2**30
