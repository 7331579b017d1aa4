"""Test the cost benchmark: models and prompts, estimates, memory checks, timing, and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from experiments.benchmarks.harness import run_in_child_process, run_in_turns
from experiments.benchmarks.model_cost import models as models_module
from experiments.benchmarks.model_cost import run
from experiments.benchmarks.model_cost.record_markdown import cost_record_markdown
from experiments.benchmarks.model_cost.records import (
    MeasuredModel,
    TimeRatio,
    group_by_setting,
    read_cost_record,
    time_ratios,
)
from experiments.benchmarks.model_cost.run import measure_answer, run_cost_benchmark
from experiments.config.benchmark_schema import CostConfig
from experiments.config.schema import Config

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
TINY = CostConfig("tiny", [1, 2], [1, 3], text=9, answer=2)
MINI, MINI_4 = "LLaVA-Mini, 1 token", "LLaVA-Mini, 4 tokens"


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return models_module.build_models(models_module.model_configs(TINY), "float32", CPU)


def key_value_bytes(config: Any, tokens: int) -> int:
    """Return the bytes of the keys and values of this many tokens in float32."""
    text = config.text_config
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * tokens * 4


OPTIONS = {"geometry": "tiny", "sizes": [1], "frames": [2], "text": 9, "answer": 3, "repeats": 2, "threads": 1}


def check_written(results: Path) -> None:
    """Check the files that a run with OPTIONS writes."""
    (path,) = (results / "cost").glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["model"], row["frames"], row["visual_tokens"]) for row in rows] == [("LLaVA", 2, 72), (MINI, 2, 2)]
    config = models_module.model_configs(TINY)["LLaVA"]
    for row in rows:
        assert row["cache_bytes"] == row["cache_estimate"] == key_value_bytes(config, row["visual_tokens"] + 9)
        assert all(len(times) == 2 for times in row["seconds"].values())
        assert row["memory"]["resident"] > 0
    assert (path.with_suffix(".png")).stat().st_size > 1000
    (rows,) = group_by_setting([read_cost_record(path)]).values()
    assert [row.size for row in rows] == [0, 1]
    assert json.loads(path.read_text())["pixels"] == 48
    assert "| LLaVA-Mini, 1 token | 2 | 2 |" in path.with_suffix(".md").read_text()
    assert not list((results / "cost").glob(".*")), "no temporary file is left"


@pytest.mark.slow
def test_command_writes_record_table_and_figure(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.run", "experiment=cost", f"results={tmp_path}", "device=cpu"]
    command += [f"cost.{name}={value}" for name, value in OPTIONS.items()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    check_written(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "tiles"), [("LLaVA", 1), ("LLaVA", 2), (MINI, 2)])
def test_memory_process_reports_weights_and_one_answer(model: str, tiles: int) -> None:
    cost = CostConfig("smol", [1], [1], tiles=tiles, text=4, answer=2, threads=1)
    _, needs, _ = models_module.estimate_models(cost, CPU)[model, 1]
    peaks = run_in_child_process(
        "experiments.benchmarks.model_cost.run", {"cost": asdict(cost), "model": model, "frames": 1, "device": "cpu"}
    )
    assert list(peaks) == ["resident"]
    assert needs.weights < peaks["resident"] < 1.3 * needs.total


def test_run_cost_benchmark_writes_record_table_and_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that measure memory are replaced."""
    requests = []
    monkeypatch.setattr(
        run, "run_in_child_process", lambda module, request: requests.append(request) or {"resident": 2**24}
    )
    written = run_cost_benchmark(Config(results=str(tmp_path), device="cpu", cost=CostConfig(**OPTIONS)), {})
    assert [path.suffix for path in written] == [".json", ".md", ".png", ".pdf"]
    check_written(tmp_path)
    assert [(request["model"], request["frames"]) for request in requests] == [("LLaVA", 2), (MINI, 2)]
    assert json.loads(json.dumps(requests)) == requests


def test_build_models_share_weights(models: dict[str, Any]) -> None:
    """An ordinary model with the same weights gives the same logits."""
    inputs = models_module.prompt_inputs(models[MINI_4], 3, 9)
    logits = models[MINI_4](**inputs).logits
    ordinary: Any = AutoModelForImageTextToText.from_config(models[MINI_4].config).eval()
    ordinary.load_state_dict(models[MINI_4].state_dict())
    torch.testing.assert_close(logits, ordinary(**inputs).logits)
    assert models[MINI].model.prefusion is not None
    for part in (
        "model.vision_tower",
        "model.multi_modal_projector",
        "model.language_model.embed_tokens",
        "lm_head",
    ):
        assert len({next(m.get_submodule(part).parameters()).data_ptr() for m in models.values()}) == 1, part


@pytest.mark.parametrize(("frames", "tiles"), [(1, 1), (3, 1), (1, 2), (3, 3)])
def test_estimate_models_equal_counts_of_running_models(models: dict[str, Any], frames: int, tiles: int) -> None:
    """FLOPs, weights and cache bytes of one answer equal those of torch."""
    expected = models_module.estimate_models(replace(TINY, tiles=tiles), CPU)
    for name, model in models.items():
        estimate, needs, fits = expected[name, frames]
        inputs = models_module.prompt_inputs(model, frames, TINY.text, tiles)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            answer = measure_answer(model, inputs, 2, CPU)
        row = run._estimated_entries(name, estimate, needs, TINY)
        assert counter.get_total_flops() == pytest.approx(
            MeasuredModel(row, None).flops + row["flops"]["decode"], rel=5e-3
        )
        assert needs.weights == sum(p.nbytes for p in model.parameters())
        length = inputs["input_ids"].shape[1]
        assert answer.cache_bytes == key_value_bytes(model.config, length)
        assert needs.cache == pytest.approx(key_value_bytes(model.config, length + 2))
        assert fits


def test_measure_answer_assigns_seconds_to_component(models: dict[str, Any]) -> None:
    """A delay in the vision tower adds to the tower and to the first token only."""
    model = models[MINI]
    model.config.frames_per_chunk = 2
    inputs = models_module.prompt_inputs(model, 3, 9)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    plain = measure_answer(model, inputs, 4, CPU).seconds
    handle = model.model.vision_tower.embeddings.register_forward_hook(lambda *_: time.sleep(0.5))
    slow = measure_answer(model, inputs, 4, CPU).seconds
    handle.remove()
    assert slow["tower"] - plain["tower"] == pytest.approx(1.0, abs=0.2), "0.5 s in each of two chunks"
    assert slow["first token"] - plain["first token"] == pytest.approx(1.0, abs=0.3)
    assert all(abs(slow[name] - plain[name]) < 0.3 for name in slow if name not in ("tower", "first token"))
    parts = sum(seconds for name, seconds in plain.items() if name not in ("first token", "decode"))
    assert 0.4 * plain["first token"] < parts <= plain["first token"]
    assert min(plain.values()) > 0
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_measure_answer_decode_is_seconds_per_further_token(models: dict[str, Any]) -> None:
    model = models[MINI]
    inputs = models_module.prompt_inputs(model, 1, 9)
    plain = measure_answer(model, inputs, 3, CPU).seconds["decode"]
    handle = model.lm_head.register_forward_hook(lambda *_: time.sleep(0.3))
    slow = measure_answer(model, inputs, 3, CPU).seconds["decode"]
    handle.remove()
    assert slow - plain == pytest.approx(0.3, abs=0.08)


def test_run_in_turns_calls_each_run_once_per_round() -> None:
    order: list[str] = []
    results = run_in_turns({name: lambda name=name: order.append(name) or len(order) for name in "ab"}, 2)
    assert order == ["a", "b", "a", "b"]
    assert results == {"a": [1, 3], "b": [2, 4]}


def test_run_cost_benchmark_too_many_frames_raises_before_building(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.benchmarks.model_cost.run.build_models", lambda *_: pytest.fail("built"))
    config = Config(results=str(tmp_path), device="cpu", cost=CostConfig("tiny", [1], [1, 10**9]))
    message = "cost: .*over 1,000,000,000 frames .*LLaVA-Mini, 1 token needs least"
    with pytest.raises(ValueError, match=message) as raised:
        run_cost_benchmark(config, {})
    assert len(str(raised.value).splitlines()) == 1
    needs = models_module.MemoryNeeds.of(
        models_module.CostModel(models_module.model_configs(TINY)[MINI])(models_module.Prompt(60, 10**9)), 16, 4
    )
    assert f"{needs.cache / 2**30:,.3g} GiB of cache alone" in str(raised.value)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(("frames", "tiles"), [(1, 30_000), (7, 20_000)])
def test_run_cost_benchmark_too_many_tiles_raises_before_building(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: int, tiles: int
) -> None:
    monkeypatch.setattr("experiments.benchmarks.model_cost.run.build_models", lambda *_: pytest.fail("built"))
    cost = CostConfig("tiny", [1], [frames], tiles=tiles)
    message = rf"cost: .*over {frames:,} frames? of {tiles:,} x {tiles:,} tiles .*LLaVA-Mini, 1 token needs least"
    with pytest.raises(ValueError, match=message):
        run_cost_benchmark(Config(results=str(tmp_path), device="cpu", cost=cost), {})


def test_memory_needs_grow_with_crops_held_at_once() -> None:
    """LLaVA holds the crops of all frames, LLaVA-Mini those of a chunk, with all their patches in pre-fusion."""
    vision_tower_dominates = models_module.model_configs(replace(TINY, geometry="smol"))["LLaVA"]
    llava, mini = (
        models_module.CostModel(config) for config in (vision_tower_dominates, models_module.model_configs(TINY)[MINI])
    )
    one, five = (models_module.MemoryNeeds.of(llava(models_module.Prompt(9, 200, tiles)), 2, 4) for tiles in (1, 2))
    assert five.activations == pytest.approx(5 * one.activations, rel=0.01)
    whole, cut = (models_module.MemoryNeeds.of(mini(models_module.Prompt(9, 32, tiles)), 2, 4) for tiles in (1, 2))
    assert 4 < cut.activations / whole.activations < 5, "the text does not grow with the crops"
    more_frames = models_module.MemoryNeeds.of(mini(models_module.Prompt(9, 64, 2)), 2, 4)
    assert more_frames.activations == pytest.approx(cut.activations, rel=0.01)
    assert cut.cache == whole.cache


def test_prompt_inputs_with_tiles_hold_all_crops(models: dict[str, Any]) -> None:
    inputs = models_module.prompt_inputs(models["LLaVA"], 2, 9, 2)
    assert inputs["pixel_values"].shape == (10, 3, 48, 48)
    assert int((inputs["input_ids"] == models["LLaVA"].config.image_token_id).sum()) == 2 * 5 * 36
    inputs = models_module.prompt_inputs(models[MINI_4], 2, 9, 2)
    assert [frame.shape[0] for frame in inputs["pixel_values"]] == [5, 5]
    assert inputs["visual_layout"].tolist() == [[0, 2, 2]]
    assert int((inputs["input_ids"] == models[MINI_4].config.image_token_id).sum()) == 2 * 4


def test_estimate_models_marks_models_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    many = replace(TINY, frames=[100])
    needs = {key: needs.total for key, (_, needs, _) in models_module.estimate_models(many, CPU).items()}
    assert needs[MINI, 100] < needs["LLaVA", 100]
    between = int(needs[MINI, 100] + needs["LLaVA", 100]) // 2
    monkeypatch.setattr(models_module, "free_memory", lambda device: between)
    assert {key for key, (*_, fits) in models_module.estimate_models(many, CPU).items() if not fits} == {("LLaVA", 100)}
    monkeypatch.setattr(models_module, "free_memory", lambda device: 2**20)
    with pytest.raises(ValueError, match=r"cost: .*over 1 frame .*0\.000977 GiB that are free"):
        models_module.estimate_models(TINY, CPU)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"frames": []}, r"cost\.frames: .*\[\]"),
        ({"sizes": [0]}, r"cost\.sizes: .*0"),
        ({"tiles": 0}, r"cost\.tiles: .*0"),
        ({"answer": 1}, r"cost\.answer: .*2.*1"),
        ({"dtype": "int8"}, r"cost\.dtype: .*'int8'"),
    ],
)
def test_cost_config_invalid_field_raises(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CostConfig(**{"geometry": "tiny", "sizes": [1], "frames": [1]} | fields)


def test_model_configs_of_llava_mini_raises(tmp_path: Path) -> None:
    models_module.model_configs(TINY)[MINI].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"cost\.geometry: .* is a LLaVA-Mini"):
        models_module.model_configs(CostConfig(str(tmp_path), [1], [1]))


def test_model_configs_of_no_architecture_names_the_setting() -> None:
    with pytest.raises(ValueError, match=r"^cost\.geometry: .*'rock'"):
        models_module.model_configs(CostConfig("rock", [1], [1]))


def test_run_in_child_process_failure_raises_with_its_last_line() -> None:
    with pytest.raises(
        RuntimeError, match=r"process of experiments\.no_such_module .*No module named .*no_such_module"
    ):
        run_in_child_process("experiments.no_such_module", {})


def test_cost_record_markdown_shows_times_ratios_and_needs() -> None:
    def row(model: str, frames: int, first_token: list[float] | None) -> dict[str, Any]:
        seconds = {name: [0.25, 0.25] for name in ("tower", "projector", "compressor", "prefusion", "prefill", "head")}
        return {
            "model": model,
            "frames": frames,
            "visual_tokens": frames,
            "prefusion_layers": 4,
            "flops": dict.fromkeys((*seconds, "decode"), 1e12),
            "cache_bytes": 2**20 if first_token else None,
            "cache_estimate": 2**21,
            "needs": {"total": 3 * 2**30, "weights": 2**20},
            "memory": {"resident": 2**22, "allocated": 2**23, "reserved": 2**24} if first_token else None,
            "seconds": {**seconds, "first token": first_token, "decode": [0.5, 0.1]} if first_token else None,
        }

    record = {
        "cost": vars(TINY),
        "pixels": 48,
        "machine": "a GPU",
        "provenance": {"device": "a GPU"},
        "rows": [
            row("LLaVA", 1, [4.0, 8.0]),
            row(MINI, 1, [2.0, 2.0]),
            row("LLaVA", 9, None),
            row(MINI, 9, [3.0, 5.0]),
        ],
    }
    assert time_ratios(record, "first token")[MINI, 1] == TimeRatio(3.0, 2.0, 4.0)
    assert time_ratios(record, "first token")[MINI, 9] is None
    lines = cost_record_markdown(record).splitlines()
    assert lines[3].startswith(
        "| LLaVA-Mini, 1 token | 1 | 1 | 6 | 2,000.0 (2,000.0 to 2,000.0) | 3.00 (2.00 to 4.00) |"
    )
    assert lines[3].endswith("| 3.3 | 1.00 (1.00 to 1.00) | 1.00 (2.00) | 4 / 8 / 16 | 1 |")
    assert "| LLaVA | 9 | 9 | 6 | not run: needs about 3 GiB |" in lines[4]
    assert "peak MiB: resident, allocated, reserved" in lines[0]
    assert "| LLaVA-Mini, 1 token | 9 | 250.00 (1e+03) |" in "\n".join(lines)
    assert all(line.count("|") == lines[0].count("|") for line in lines[:6])
