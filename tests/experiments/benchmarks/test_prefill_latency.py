"""Latency of an ablation's models: what is built and timed, and how it gets into the report."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.benchmarks import prefill_latency
from experiments.config import plain as plain_module
from experiments.config import schema
from experiments.records.files import load
from experiments.records.latency import FILE, timed_part
from experiments.report.run_groups import ablation_cells, group_cells
from experiments.report.tables.ablation import ablation_table

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """A resolved configuration of the tiny LLaVA."""
    typed = schema.Config(
        model=schema.CheckpointModel(name="tiny", path="asset:tiny", grid=6),
        data=schema.ShapesData(name="shapes", train=8, test=4),
        train=schema.TrainConfig(steps=7),
    )
    return plain_module.resolved(typed)


def mini(plain: dict[str, Any], size: int = 1, layers: int = 2, **more: Any) -> dict[str, Any]:
    changed = copy.deepcopy(plain) | more
    changed["compressor"] |= {"name": "query", "size": size}
    changed["prefusion"] |= {"layers": layers}
    return changed


def record_of(config: dict[str, Any], identity: str) -> dict[str, Any]:
    """A finished cell."""
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


def write(folder: Path, *records: dict[str, Any]) -> Path:
    (folder / "records").mkdir(parents=True)
    for record in records:
        (folder / "records" / f"{record['id']}.json").write_text(json.dumps(record))
    return folder


def test_a_recorded_configuration_becomes_what_ran(plain: dict[str, Any]) -> None:
    typed = plain_module.typed(plain)
    assert isinstance(typed.model, schema.CheckpointModel)
    assert isinstance(typed.data, schema.ShapesData)
    assert typed.train.steps == 7
    assert plain_module.resolved(typed) == plain
    older = copy.deepcopy(plain)
    del older["model"]["grid"], older["tiles"]
    assert plain_module.typed(older).model == schema.CheckpointModel(name="tiny", path=plain["model"]["path"])
    with pytest.raises(ValueError, match="model: no kind of it has the settings name, shape"):
        plain_module.typed(plain | {"model": {"name": "tiny", "shape": 3}})
    with pytest.raises(ValueError, match="not a configuration of this version: Key 'colour'"):
        plain_module.typed(plain | {"colour": 3})


def test_what_takes_a_time_of_its_own(plain: dict[str, Any]) -> None:
    trained = copy.deepcopy(plain) | {"seed": 5, "name": "other", "results": "elsewhere"}
    trained["train"]["steps"] = 99
    assert timed_part(trained) == timed_part(plain)
    assert timed_part(mini(plain)) != timed_part(plain)
    assert timed_part(mini(plain, tiles=2)) != timed_part(mini(plain))
    assert timed_part(json.loads(timed_part(plain))) == timed_part(plain)


def test_each_model_is_timed_once_and_in_turns(plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes that run are those of the models that the configurations name, on shared weights."""
    ran: list[Any] = []

    def passes(model: Any, asked: dict[str, Any], *more: Any) -> float:
        ran.append((model, asked))
        return float(len(ran))

    monkeypatch.setattr(prefill_latency, "_prefill", passes)
    configs = [plain, mini(plain), mini(plain, 2, 1), plain | {"seed": 1}]
    found = prefill_latency.measure(configs, 2, CPU)
    assert [timed_part(row["config"]) for row in found["rows"]] == [timed_part(config) for config in configs[:3]]
    assert [row["seconds"] for row in found["rows"]] == [[4, 7], [5, 8], [6, 9]]
    models = [model for model, _ in ran]
    assert models == models[:3] * 3, "a turn that does not count, and two that do"
    llava, one, four = models[:3]
    assert one.config.compressor_size == 1
    assert one.config.prefusion_layers == 2
    assert (four.config.compressor_size, four.config.prefusion_layers) == (2, 1)
    for part in ("vision_tower", "language_model", "multi_modal_projector"):
        assert getattr(one.model, part) is getattr(llava.model, part) is getattr(four.model, part)
    visual = [int((asked["input_ids"] == model.config.image_token_id).sum()) for model, asked in ran[:3]]
    assert visual == [36, 1, 4]
    assert "labels" not in ran[0][1]


def test_a_reduction_is_timed_as_it_runs(plain: dict[str, Any]) -> None:
    """VTW: the last layers hold no visual tokens while it is timed, and nothing stays on the model."""
    reduced = copy.deepcopy(plain)
    reduced["reduction"] |= {"name": "vtw", "layers": [3]}
    runs = dict(prefill_latency._passes([plain, reduced], CPU, []))
    whole, less = runs[timed_part(plain)], runs[timed_part(reduced)]
    model = less.args[0]  # type: ignore[attr-defined]
    lengths: list[int] = []
    handle = model.model.language_model.layers[-1].register_forward_hook(
        lambda module, given, result: lengths.append(given[0].shape[1])
    )
    whole()
    less()
    whole()
    handle.remove()
    assert lengths == [lengths[0], lengths[0] - 36, lengths[0]]


def test_a_model_that_shares_answers_as_it_did(plain: dict[str, Any]) -> None:
    """Putting another model's parts in, made from the same checkpoint, changes no answer."""
    from experiments.benchmarks.model_cost.models import share
    from experiments.models.build import build_model

    given = {"input_ids": torch.tensor([[1, 5, 6]])}
    llava, _ = build_model(plain_module.typed(plain), None)
    torch.manual_seed(0)
    one, _ = build_model(plain_module.typed(mini(plain)), None)
    given["input_ids"][0, 1] = one.config.image_token_id
    given["pixel_values"] = torch.randn(1, 3, 48, 48)
    before = one(**given).logits
    share(one, llava)
    torch.testing.assert_close(one(**given).logits, before)
    assert one.lm_head is llava.lm_head


def test_the_command_times_and_the_report_shows(tmp_path: Path, plain: dict[str, Any]) -> None:
    lost = mini(plain)
    lost["model"] = plain["model"] | {"path": "./no/such/folder"}
    records = [record_of(plain, "a"), record_of(mini(plain), "b"), record_of(mini(plain) | {"seed": 1}, "c")]
    results = write(tmp_path, *records, record_of(lost, "d"))
    assert all(cell.latency != cell.latency for cell in ablation_cells(group_cells(load(results / "records")))), (
        "not measured"
    )
    assert prefill_latency.main(["--results", str(results), "--repeats", "2", "--device", "cpu"]) == 0
    measured = json.loads((results / FILE).read_text())
    assert len(measured["rows"]) == 2
    assert [left["error"] for left in measured["left_out"]] == ["model.path: no folder './no/such/folder'"]
    for row, seconds in zip(measured["rows"], (0.5, 0.25), strict=True):
        assert 0 < min(row["seconds"]) < 60
        row["seconds"] = [seconds, 9.0, 0.1]
    (results / FILE).write_text(json.dumps(measured))
    loaded = load(results / "records")
    assert [record["cost"].get("latency") for record in loaded.finished] == [0.5, 0.25, 0.25, None]
    cells = {(cell.prefusion_layers, len(cell.finished)): cell for cell in ablation_cells(group_cells(loaded))}
    assert cells[0, 1].latency == 0.5
    assert cells[2, 2].latency == 0.25
    table = ablation_table(ablation_cells(group_cells(loaded)))
    assert set(table.text["Latency (ms)"]) >= {"500.0", "250.0", "not timed"}
    assert any("median of 2 rounds in which all models took turns" in note for note in table.notes)


def test_without_a_measurement_there_is_no_column(tmp_path: Path, plain: dict[str, Any]) -> None:
    table = ablation_table(ablation_cells(group_cells(load(write(tmp_path, record_of(plain, "a")) / "records"))))
    assert "Latency (ms)" not in table.text.columns
    assert "latency_seconds" not in table.data.columns


def test_wrong_input_is_one_line(tmp_path: Path, plain: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert prefill_latency.main(["--results", str(tmp_path)]) == 1
    assert "no records in" in capsys.readouterr().err
    older = record_of(plain | {"colour": 3}, "a")
    results = write(tmp_path, older)
    assert prefill_latency.main(["--results", str(results), "--repeats", "0"]) == 1
    assert "--repeats: must be at least 1, found 0" in capsys.readouterr().err
    assert prefill_latency.main(["--results", str(results), "--device", "cpu"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: no configuration could be timed"
    assert not (results / FILE).exists()
    (results / FILE).write_text('{"rows": [')
    with pytest.raises(ValueError, match=r"latency.json is no whole measurement .* measure again with `python -m"):
        load(results / "records")
