from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.records.files import load
from experiments.records.schema import check

Records = list[dict[str, Any]]


def test_load_separates_finished_failed_and_unreadable(
    records: Records, write_records: Callable[[Records], Path]
) -> None:
    folder = write_records(records) / "records"
    (folder / "half.json").write_text(json.dumps(records[0])[:200])
    (folder / "latin.json").write_bytes(b'{"schema": "\xe9"}')
    (folder / "half-written.tmp").write_text("{")
    loaded = load(folder)
    assert len(loaded.finished) == 14
    assert [record["id"] for record in loaded.failed] == [record["id"] for record in records if record["error"]]
    assert [hole.name for hole in loaded.unreadable] == ["half.json", "latin.json"]
    assert "truncated" in loaded.unreadable[0].reason
    assert loaded.holes[0].reason == "failed: RuntimeError: out of memory at step 12_000"


def test_no_records_names_the_folder_and_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"no records in {tmp_path}.*python -m experiments\.run"):
        load(tmp_path)


@pytest.mark.parametrize("newer_first", [True, False])
def test_a_newer_record_replaces_an_older_of_the_same_configuration(
    records: Records, write_records: Callable[[Records], Path], newer_first: bool
) -> None:
    newer = copy.deepcopy(records[0])
    newer["id"] = ("0" if newer_first else "z") * 16
    newer["provenance"]["started"] = "2026-11-22T10:00:00"
    newer["data"]["fingerprint"] = "another"
    records[0]["id"] = "5" * 16
    loaded = load(write_records([records[0], newer]) / "records")
    assert [record["id"] for record in loaded.finished] == [newer["id"]]
    assert "5" * 16 in loaded.superseded[0].name


def test_a_record_from_before_a_setting_is_of_its_old_behaviour(
    records: Records, write_records: Callable[[Records], Path]
) -> None:
    """It is the same cell as a newer one that says so, and another than one that says something else."""
    older, same, other = (copy.deepcopy(records[0]) for _ in range(3))
    for name, record in (("a", older), ("b", same), ("c", other)):
        record["id"], record["provenance"]["started"] = name * 16, f"2026-11-2{ord(name) - 96}T10:00:00"
    older["config"]["train"].pop("prefusion_learning_rate", None)
    same["config"]["train"]["prefusion_learning_rate"] = None
    other["config"]["train"]["prefusion_learning_rate"] = 1e-4
    strange = copy.deepcopy(records[0])
    strange["id"], strange["config"]["train"] = "d" * 16, None
    loaded = load(write_records([older, same, other, strange]) / "records")
    assert [record["id"] for record in loaded.finished] == [same["id"], other["id"], strange["id"]]


def remove(path: str) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for key in parents:
            record = record[key]
        del record[last]

    return change


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for key in parents:
            record = record[key]
        record[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("schema", 2), "schema 2, this report reads schema 1"),
        (put("status", "running"), "status is 'running'"),
        (remove("config"), "config is missing"),
        (remove("model.layers"), "model.layers is missing"),
        (put("model.layers", "six"), "model.layers is 'six', of the wrong type"),
        (put("data.examples", True), "data.examples is True, of the wrong type"),
        (put("accuracy.image", "01"), "accuracy.image has 2 outcomes for 120 examples"),
        (put("accuracy.blank", "x" * 120), "accuracy.blank is not a string of 0 and 1"),
        (put("data.kinds", ["place"]), "data.kinds has 1 entries for 120 examples"),
        (put("cost.flops", None), "cost.flops is None, of the wrong type"),
        (put("cost.cache_bytes", "12"), "cost.cache_bytes is '12', of the wrong type"),
        (put("removal.onward", []), "removal.onward is missing or empty"),
        (
            put("removal.onward", [{"layers": [0], "correct": "1" * 120}]),
            "removal.onward does not go from all 6 layers",
        ),
        (put("removal.inside", [{"layers": [9], "correct": "1" * 120}]), "goes beyond the model's 6 layers"),
        (put("attention.mass", [[[0.1]]]), r"attention.mass has shape \(1, 1, 1\), expected \(3, 6, 40\)"),
        (put("attention.entropy", [[1], [1, 2]]), "attention.entropy is not a full array of numbers"),
        (put("knockout.width", 1), "knockout.windows are not the intact model and all windows of 1 of 6 layers"),
        (put("knockout.windows", [{"layers": []}]), "knockout.windows are not the intact model and all windows of 2"),
        (put("readout.depths", []), "readout.depths has 0 entries for 6 layers and none"),
        (put("readout.samples", 5), r"readout.depths\[0\].correct has 117 outcomes for 5 examples"),
        (put("lens.depths", []), "lens.depths has 0 entries for 6 layers and none"),
        (put("lens.samples", 5), r"lens.depths\[0\].correct has 120 outcomes for 5 examples"),
        (lambda record: record["lens"]["depths"][2].pop("logprob"), r"lens.depths\[2\].logprob is missing"),
        (remove("fusion.removal.layers"), "fusion.removal.layers is missing"),
        (put("fusion.removal.low", None), "fusion.removal has a depth but no interval"),
    ],
)
def test_check_says_what_is_wrong(
    probed: dict[str, Any], change: Callable[[dict[str, Any]], None], message: str
) -> None:
    check(probed)
    change(probed)
    with pytest.raises(ValueError, match=message) as error:
        check(probed)
    assert "\n" not in str(error.value)


def test_optional_parts_may_be_missing(probed: dict[str, Any]) -> None:
    for path in ("removal.random_inside", "attention.control", "attention.uniform_mass", "data.guess", "cost"):
        remove(path)(probed)
    probed["accuracy"] = {"image": probed["accuracy"]["image"]}
    probed["fusion"]["attention"] = None
    check(probed)
