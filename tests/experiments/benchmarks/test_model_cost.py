"""Measured costs: what is built and asked, what is counted of it, what is refused, and a run through the command line."""

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

from experiments.benchmarks.harness import in_child, in_turns
from experiments.benchmarks.model_cost import models as models_module
from experiments.benchmarks.model_cost import run
from experiments.benchmarks.model_cost.markdown import table
from experiments.benchmarks.model_cost.records import Measured, Ratio, measured, ratios, read
from experiments.benchmarks.model_cost.run import answer, run_cost
from experiments.config.schema import Config, CostConfig

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
TINY = CostConfig("tiny", [1, 2], [1, 3], text=9, answer=2)
MINI, MINI_4 = "LLaVA-Mini, 1 token", "LLaVA-Mini, 4 tokens"


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return models_module.build(models_module.configurations(TINY), "float32", CPU)


def key_value_bytes(config: Any, tokens: int) -> int:
    """In float32."""
    text = config.text_config
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * tokens * 4


SIZES = {"geometry": "tiny", "sizes": [1], "frames": [2], "text": 9, "answer": 3, "repeats": 2, "threads": 1}


def check_written(results: Path) -> None:
    """What a run of SIZES writes."""
    (path,) = (results / "cost").glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["model"], row["frames"], row["visual_tokens"]) for row in rows] == [("LLaVA", 2, 72), (MINI, 2, 2)]
    config = models_module.configurations(TINY)["LLaVA"]
    for row in rows:
        assert row["cache_bytes"] == row["cache_estimate"] == key_value_bytes(config, row["visual_tokens"] + 9)
        assert all(len(times) == 2 for times in row["seconds"].values())
        assert row["memory"]["resident"] > 0
    assert (path.with_suffix(".png")).stat().st_size > 1000
    (rows,) = measured([read(path)]).values()
    assert [row.size for row in rows] == [0, 1]
    assert json.loads(path.read_text())["pixels"] == 48
    assert "| LLaVA-Mini, 1 token | 2 | 2 |" in path.with_suffix(".md").read_text()
    assert not list((results / "cost").glob(".*")), "nothing half written is left"


@pytest.mark.slow
def test_the_command_measures_all(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.run", "experiment=cost", f"results={tmp_path}", "device=cpu"]
    command += [f"cost.{name}={value}" for name, value in SIZES.items()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    check_written(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "tiles"), [("LLaVA", 1), ("LLaVA", 2), (MINI, 2)])
def test_memory_is_that_of_weights_and_one_answer(model: str, tiles: int) -> None:
    cost = CostConfig("smol", [1], [1], tiles=tiles, text=4, answer=2, threads=1)
    _, needs, _ = models_module.estimates(cost, CPU)[model, 1]
    found = in_child(
        "experiments.benchmarks.model_cost.run", {"cost": asdict(cost), "model": model, "frames": 1, "device": "cpu"}
    )
    assert list(found) == ["resident"]
    assert needs.weights < found["resident"] < 1.3 * needs.total


def test_a_run_writes_record_table_and_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the processes in which memory is measured."""
    asked = []
    monkeypatch.setattr(run, "in_child", lambda module, words: asked.append(words) or {"resident": 2**24})
    written = run_cost(Config(results=str(tmp_path), device="cpu", cost=CostConfig(**SIZES)), {})
    assert [path.suffix for path in written] == [".json", ".md", ".png", ".pdf"]
    check_written(tmp_path)
    assert [(words["model"], words["frames"]) for words in asked] == [("LLaVA", 2), (MINI, 2)]
    assert json.loads(json.dumps(asked)) == asked


def test_models_share_their_weights(models: dict[str, Any]) -> None:
    """And are what the same weights give in a model made as any other."""
    given = models_module.inputs(models[MINI_4], 3, 9)
    found = models[MINI_4](**given).logits
    whole: Any = AutoModelForImageTextToText.from_config(models[MINI_4].config).eval()
    whole.load_state_dict(models[MINI_4].state_dict())
    torch.testing.assert_close(found, whole(**given).logits)
    assert models[MINI].model.prefusion is not None
    for part in (
        "model.vision_tower",
        "model.multi_modal_projector",
        "model.language_model.embed_tokens",
        "lm_head",
    ):
        assert len({next(m.get_submodule(part).parameters()).data_ptr() for m in models.values()}) == 1, part


@pytest.mark.parametrize(("frames", "tiles"), [(1, 1), (3, 1), (1, 2), (3, 3)])
def test_the_estimate_is_of_what_runs(models: dict[str, Any], frames: int, tiles: int) -> None:
    """FLOPs, weights and cache bytes of one answer, as torch counts and holds them."""
    expected = models_module.estimates(replace(TINY, tiles=tiles), CPU)
    for name, model in models.items():
        estimate, needs, fits = expected[name, frames]
        given = models_module.inputs(model, frames, TINY.text, tiles)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            found = answer(model, given, 2, CPU)
        row = run._row(name, estimate, needs, TINY)
        assert counter.get_total_flops() == pytest.approx(Measured(row, None).flops + row["flops"]["decode"], rel=5e-3)
        assert needs.weights == sum(p.nbytes for p in model.parameters())
        length = given["input_ids"].shape[1]
        assert found.cache_bytes == key_value_bytes(model.config, length)
        assert needs.cache == pytest.approx(key_value_bytes(model.config, length + 2))
        assert fits


def test_seconds_belong_to_their_component(models: dict[str, Any]) -> None:
    """A tower that waits: that much goes to the tower and to the first token, whoever else is timed."""
    model = models[MINI]
    model.config.frames_per_chunk = 2
    given = models_module.inputs(model, 3, 9)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    plain = answer(model, given, 4, CPU).seconds
    handle = model.model.vision_tower.embeddings.register_forward_hook(lambda *_: time.sleep(0.5))
    slow = answer(model, given, 4, CPU).seconds
    handle.remove()
    assert slow["tower"] - plain["tower"] == pytest.approx(1.0, abs=0.2), "in either chunk"
    assert slow["first token"] - plain["first token"] == pytest.approx(1.0, abs=0.3)
    assert all(abs(slow[name] - plain[name]) < 0.3 for name in slow if name not in ("tower", "first token"))
    parts = sum(seconds for name, seconds in plain.items() if name not in ("first token", "decode"))
    assert 0.4 * plain["first token"] < parts <= plain["first token"]
    assert min(plain.values()) > 0
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_decode_is_seconds_of_each_further_token(models: dict[str, Any]) -> None:
    model = models[MINI]
    given = models_module.inputs(model, 1, 9)
    plain = answer(model, given, 3, CPU).seconds["decode"]
    handle = model.lm_head.register_forward_hook(lambda *_: time.sleep(0.3))
    slow = answer(model, given, 3, CPU).seconds["decode"]
    handle.remove()
    assert slow - plain == pytest.approx(0.3, abs=0.08)


def test_runs_take_turns() -> None:
    order: list[str] = []
    found = in_turns({name: lambda name=name: order.append(name) or len(order) for name in "ab"}, 2)
    assert order == ["a", "b", "a", "b"]
    assert found == {"a": [1, 3], "b": [2, 4]}


def test_a_size_without_room_is_refused_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.benchmarks.model_cost.run.build", lambda *_: pytest.fail("built"))
    config = Config(results=str(tmp_path), device="cpu", cost=CostConfig("tiny", [1], [1, 10**9]))
    with pytest.raises(
        ValueError, match="over 1,000,000,000 frames has no room on cpu: LLaVA-Mini, 1 token takes least"
    ) as said:
        run_cost(config, {})
    assert len(str(said.value).splitlines()) == 1
    needs = models_module.Needs.of(
        models_module.Geometry(models_module.configurations(TINY)[MINI])(models_module.Prompt(60, 10**9)), 16, 4
    )
    assert f"{needs.cache / 2**30:,.3g} GiB of cache alone" in str(said.value)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(("frames", "tiles"), [(1, 30_000), (7, 20_000)])
def test_tiles_without_room_are_refused_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: int, tiles: int
) -> None:
    monkeypatch.setattr("experiments.benchmarks.model_cost.run.build", lambda *_: pytest.fail("built"))
    cost = CostConfig("tiny", [1], [frames], tiles=tiles)
    said = (
        rf"over {frames:,} frames? of {tiles:,} x {tiles:,} tiles has no room on cpu: LLaVA-Mini, 1 token takes least"
    )
    with pytest.raises(ValueError, match=said):
        run_cost(Config(results=str(tmp_path), device="cpu", cost=cost), {})


def test_needs_grow_with_crops_where_crops_are_held() -> None:
    """LLaVA holds the crops of all frames, LLaVA-Mini those of a chunk; the patches in pre-fusion are of all crops."""
    tower_takes_most = models_module.configurations(replace(TINY, geometry="smol"))["LLaVA"]
    llava, mini = (
        models_module.Geometry(config) for config in (tower_takes_most, models_module.configurations(TINY)[MINI])
    )
    one, five = (models_module.Needs.of(llava(models_module.Prompt(9, 200, tiles)), 2, 4) for tiles in (1, 2))
    assert five.activations == pytest.approx(5 * one.activations, rel=0.01)
    whole, cut = (models_module.Needs.of(mini(models_module.Prompt(9, 32, tiles)), 2, 4) for tiles in (1, 2))
    assert 4 < cut.activations / whole.activations < 5, "the question's words stay as they are"
    more = models_module.Needs.of(mini(models_module.Prompt(9, 64, 2)), 2, 4)
    assert more.activations == pytest.approx(cut.activations, rel=0.01)
    assert cut.cache == whole.cache


def test_the_crops_of_a_prompt(models: dict[str, Any]) -> None:
    given = models_module.inputs(models["LLaVA"], 2, 9, 2)
    assert given["pixel_values"].shape == (10, 3, 48, 48)
    assert int((given["input_ids"] == models["LLaVA"].config.image_token_id).sum()) == 2 * 5 * 36
    given = models_module.inputs(models[MINI_4], 2, 9, 2)
    assert [frame.shape[0] for frame in given["pixel_values"]] == [5, 5]
    assert given["visual_layout"].tolist() == [[0, 2, 2]]
    assert int((given["input_ids"] == models[MINI_4].config.image_token_id).sum()) == 2 * 4


def test_only_what_has_room_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    many = replace(TINY, frames=[100])
    needs = {key: needs.total for key, (_, needs, _) in models_module.estimates(many, CPU).items()}
    assert needs[MINI, 100] < needs["LLaVA", 100]
    between = int(needs[MINI, 100] + needs["LLaVA", 100]) // 2
    monkeypatch.setattr(models_module, "room", lambda device: between)
    assert {key for key, (*_, fits) in models_module.estimates(many, CPU).items() if not fits} == {("LLaVA", 100)}
    monkeypatch.setattr(models_module, "room", lambda device: 2**20)
    with pytest.raises(ValueError, match=r"over 1 frame has no room on cpu: .* than the 0.000977 GiB that are free"):
        models_module.estimates(TINY, CPU)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sizes": [0]}, "cost.sizes: must be at least 1, found 0"),
        ({"tiles": 0}, "cost.tiles: must be at least 1, found 0"),
        ({"answer": 1}, "cost.answer: must be at least 2, found 1"),
        ({"dtype": "int8"}, "cost.dtype: no 'int8'; use float32, bfloat16 or float16"),
    ],
)
def test_wrong_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CostConfig(**{"geometry": "tiny", "sizes": [1], "frames": [1]} | fields)


def test_a_llava_mini_is_no_geometry(tmp_path: Path) -> None:
    models_module.configurations(TINY)[MINI].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a LLaVA-Mini; give the LLaVA that it is compared with"):
        models_module.configurations(CostConfig(str(tmp_path), [1], [1]))


def test_a_failing_child_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"in a process of its own failed: .*no_such_module"):
        in_child("experiments.no_such_module", {})


def test_the_table_and_its_ratios() -> None:
    def row(model: str, frames: int, first: list[float] | None) -> dict[str, Any]:
        seconds = {name: [0.25, 0.25] for name in ("tower", "projector", "compressor", "prefusion", "prefill", "head")}
        return {
            "model": model,
            "frames": frames,
            "visual_tokens": frames,
            "prefusion_layers": 4,
            "flops": dict.fromkeys((*seconds, "decode"), 1e12),
            "cache_bytes": 2**20 if first else None,
            "cache_estimate": 2**21,
            "needs": {"total": 3 * 2**30, "weights": 2**20},
            "memory": {"resident": 2**22, "allocated": 2**23, "reserved": 2**24} if first else None,
            "seconds": {**seconds, "first token": first, "decode": [0.5, 0.1]} if first else None,
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
    assert ratios(record, "first token")[MINI, 1] == Ratio(3.0, 2.0, 4.0)
    assert ratios(record, "first token")[MINI, 9] is None
    written = table(record).splitlines()
    assert written[3].startswith(
        "| LLaVA-Mini, 1 token | 1 | 1 | 6 | 2,000.0 (2,000.0 to 2,000.0) | 3.00 (2.00 to 4.00) |"
    )
    assert written[3].endswith("| 3.3 | 1.00 (1.00 to 1.00) | 1.00 (2.00) | 4 / 8 / 16 | 1 |")
    assert "| LLaVA | 9 | 9 | 6 | not run: needs about 3 GiB |" in written[4]
    assert "peak MiB: resident, allocated, reserved" in written[0]
    assert "| LLaVA-Mini, 1 token | 9 | 250.00 (1e+03) |" in "\n".join(written)
    assert all(line.count("|") == written[0].count("|") for line in written[:6])
