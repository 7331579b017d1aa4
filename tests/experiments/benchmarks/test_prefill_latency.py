"""Test the prefill latency of an ablation's models: runs, results file, and columns of the report."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.benchmarks import prefill_latency
from experiments.config import data_schema, schema
from experiments.config import plain as plain_module
from experiments.records.files import load_records
from experiments.records.latency import FILE, latency_key
from experiments.report.run_groups import compare_with_baselines, group_runs
from experiments.report.tables.ablation import ablation_table

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """Return a resolved configuration of the tiny LLaVA."""
    typed = schema.Config(
        model=schema.CheckpointModel(name="tiny", path="asset:tiny", grid=6),
        data=data_schema.ShapesData(name="shapes", train_samples=8, test_samples=4),
        train=schema.TrainConfig(max_steps=7),
    )
    return plain_module.to_plain(typed)


def with_mini(plain: dict[str, Any], size: int = 1, layers: int = 2, **changes: Any) -> dict[str, Any]:
    """Return the configuration of a LLaVA-Mini, with these changes."""
    changed = copy.deepcopy(plain) | changes
    changed["compressor"] |= {"name": "query", "size": size}
    changed["prefusion"] |= {"layers": layers}
    return changed


def record_of(config: dict[str, Any], identity: str) -> dict[str, Any]:
    """Return the record of a finished cell."""
    layers, compressor = config["prefusion"]["layers"], config["compressor"]["name"]
    return {
        "schema": 1,
        "id": identity,
        "experiment": config["name"],
        "name": identity,
        "status": "finished",
        "error": None,
        "config": config,
        "accuracy": {"image": "1101"},
        "provenance": {"started": "2026"},
        "cost": {"flops": 1e9, "cache_bytes": 1e6},
        "data": {"name": "shapes", "fingerprint": "f", "examples": 4, "kinds": ["count"] * 4},
        "model": {
            "label": "LLaVA-Mini" if layers else "LLaVA",
            "layers": 6,
            "visual_tokens": 36,
            "parameters": 1,
            "prefusion_layers": layers,
            "compressor": compressor,
        },
    }


def write_records(folder: Path, *records: dict[str, Any]) -> Path:
    """Write the records into a results folder, and return the folder."""
    (folder / "records").mkdir(parents=True)
    for record in records:
        (folder / "records" / f"{record['id']}.json").write_text(json.dumps(record))
    return folder


def test_from_plain_recorded_config_gives_typed_config(plain: dict[str, Any]) -> None:
    typed = plain_module.from_plain(plain)
    assert isinstance(typed.model, schema.CheckpointModel)
    assert isinstance(typed.data, data_schema.ShapesData)
    assert typed.train.max_steps == 7
    assert plain_module.to_plain(typed) == plain
    older = copy.deepcopy(plain)
    del older["model"]["grid"], older["tiles"]
    assert plain_module.from_plain(older).model == schema.CheckpointModel(name="tiny", path=plain["model"]["path"])
    with pytest.raises(ValueError, match=r"model: .*name, shape"):
        plain_module.from_plain(plain | {"model": {"name": "tiny", "shape": 3}})
    with pytest.raises(ValueError, match="'colour'"):
        plain_module.from_plain(plain | {"colour": 3})


def test_latency_key_ignores_settings_without_effect_on_time(plain: dict[str, Any]) -> None:
    trained = copy.deepcopy(plain) | {"seed": 5, "name": "other", "results": "elsewhere"}
    trained["train"]["steps"] = 99
    assert latency_key(trained) == latency_key(plain)
    assert latency_key(with_mini(plain)) != latency_key(plain)
    assert latency_key(with_mini(plain, tiles=2)) != latency_key(with_mini(plain))
    assert latency_key(json.loads(latency_key(plain))) == latency_key(plain)


def test_measure_prefill_latency_times_each_model_once_per_round(
    plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs are those of the configured models, on shared weights."""
    calls: list[Any] = []

    def fake_prefill(model: Any, question: dict[str, Any], *others: Any) -> float:
        calls.append((model, question))
        return float(len(calls))

    monkeypatch.setattr(prefill_latency, "_prefill", fake_prefill)
    configs = [plain, with_mini(plain), with_mini(plain, 2, 1), plain | {"seed": 1}]
    latencies = prefill_latency.measure_prefill_latency(configs, 2, CPU)
    assert [latency_key(row["config"]) for row in latencies["rows"]] == [latency_key(config) for config in configs[:3]]
    assert [row["seconds"] for row in latencies["rows"]] == [[4, 7], [5, 8], [6, 9]]
    models = [model for model, _ in calls]
    assert models == models[:3] * 3, "one round does not count, two do"
    llava, one, four = models[:3]
    assert one.config.compressor_size == 1
    assert one.config.prefusion_layers == 2
    assert (four.config.compressor_size, four.config.prefusion_layers) == (2, 1)
    for part in ("vision_tower", "language_model", "multi_modal_projector"):
        assert getattr(one.model, part) is getattr(llava.model, part) is getattr(four.model, part)
    visual = [int((question["input_ids"] == model.config.image_token_id).sum()) for model, question in calls[:3]]
    assert visual == [36, 1, 4]
    assert "labels" not in calls[0][1]


def test_prefill_runs_with_reduction_drop_tokens_while_timed(plain: dict[str, Any]) -> None:
    """With VTW the last layers get no visual tokens while it is timed; afterwards the model is unchanged."""
    reduced = copy.deepcopy(plain)
    reduced["reduction"] |= {"name": "vtw", "layers": [3]}
    runs = dict(prefill_latency._prefill_runs([plain, reduced], CPU, []))
    plain_run, reduced_run = runs[latency_key(plain)], runs[latency_key(reduced)]
    model = reduced_run.args[0]  # type: ignore[attr-defined]
    lengths: list[int] = []
    handle = model.model.language_model.layers[-1].register_forward_hook(
        lambda module, args, output: lengths.append(args[0].shape[1])
    )
    plain_run()
    reduced_run()
    plain_run()
    handle.remove()
    assert lengths == [lengths[0], lengths[0] - 36, lengths[0]]


def test_share_llava_parts_of_same_checkpoint_keeps_logits(plain: dict[str, Any]) -> None:
    """The parts of another model from the same checkpoint change no logits."""
    from experiments.benchmarks.model_cost.models import share_llava_parts
    from experiments.models.build import build_model

    inputs = {"input_ids": torch.tensor([[1, 5, 6]])}
    llava, _ = build_model(plain_module.from_plain(plain), None)
    torch.manual_seed(0)
    one, _ = build_model(plain_module.from_plain(with_mini(plain)), None)
    inputs["input_ids"][0, 1] = one.config.image_token_id
    inputs["pixel_values"] = torch.randn(1, 3, 48, 48)
    before = one(**inputs).logits
    share_llava_parts(one, llava)
    torch.testing.assert_close(one(**inputs).logits, before)
    assert one.lm_head is llava.lm_head


def test_main_writes_latencies_that_the_report_shows(tmp_path: Path, plain: dict[str, Any]) -> None:
    unbuildable = with_mini(plain)
    unbuildable["model"] = plain["model"] | {"path": "./no/such/folder"}
    records = [record_of(plain, "a"), record_of(with_mini(plain), "b"), record_of(with_mini(plain) | {"seed": 1}, "c")]
    results = write_records(tmp_path, *records, record_of(unbuildable, "d"))
    assert all(
        cell.latency != cell.latency for cell in compare_with_baselines(group_runs(load_records(results / "records")))
    ), "not measured"
    assert prefill_latency.main(["--results", str(results), "--repeats", "2", "--device", "cpu"]) == 0
    measured = json.loads((results / FILE).read_text())
    assert len(measured["rows"]) == 2
    assert [left["error"] for left in measured["left_out"]] == ["model.path: no folder './no/such/folder'"]
    for row, seconds in zip(measured["rows"], (0.5, 0.25), strict=True):
        assert 0 < min(row["seconds"]) < 60
        row["seconds"] = [seconds, 9.0, 0.1]
    (results / FILE).write_text(json.dumps(measured))
    loaded = load_records(results / "records")
    assert [record["cost"].get("latency") for record in loaded.finished] == [0.5, 0.25, 0.25, None]
    cells = {(cell.prefusion_layers, len(cell.finished)): cell for cell in compare_with_baselines(group_runs(loaded))}
    assert cells[0, 1].latency == 0.5
    assert cells[2, 2].latency == 0.25
    table = ablation_table(compare_with_baselines(group_runs(loaded)))
    assert set(table.text["Latency (ms)"]) >= {"500.0", "250.0", "not timed"}
    assert any("median of 2 rounds in which all models took turns" in note for note in table.notes)


def test_ablation_table_without_latencies_has_no_latency_column(tmp_path: Path, plain: dict[str, Any]) -> None:
    table = ablation_table(
        compare_with_baselines(group_runs(load_records(write_records(tmp_path, record_of(plain, "a")) / "records")))
    )
    assert "Latency (ms)" not in table.text.columns
    assert "latency_seconds" not in table.data.columns


def test_main_invalid_input_prints_one_line(
    tmp_path: Path, plain: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert prefill_latency.main(["--results", str(tmp_path)]) == 1
    assert "records" in capsys.readouterr().err
    older = record_of(plain | {"colour": 3}, "a")
    results = write_records(tmp_path, older)
    assert prefill_latency.main(["--results", str(results), "--repeats", "0"]) == 1
    assert "--repeats: must be at least 1, found 0" in capsys.readouterr().err
    assert prefill_latency.main(["--results", str(results), "--device", "cpu"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: no configuration could be timed"
    assert not (results / FILE).exists()
    (results / FILE).write_text('{"rows": [')
    with pytest.raises(ValueError, match=r"latency\.json: .*measure again"):
        load_records(results / "records")
