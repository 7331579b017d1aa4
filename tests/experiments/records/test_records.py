"""Records: reading files and folders of them, the schema, and old names of settings."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from experiments.config import renamed_keys
from experiments.records.files import load_records, read_record
from experiments.records.schema import check_record, json_schema
from tests.experiments.sample_records import fail

ROOT = Path(__file__).resolve().parents[3]

Records = list[dict[str, Any]]


def test_load_records_separates_finished_failed_and_unreadable(
    records: Records, write_records: Callable[[Records], Path]
) -> None:
    folder = write_records(records) / "records"
    (folder / "half.json").write_text(json.dumps(records[0])[:200])
    (folder / "latin.json").write_bytes(b'{"schema": "\xe9"}')
    (folder / "half-written.tmp").write_text("{")
    loaded = load_records(folder)
    assert len(loaded.finished) == 14
    assert [record["id"] for record in loaded.failed] == [record["id"] for record in records if record["error"]]
    assert [entry.name for entry in loaded.unreadable] == ["half.json", "latin.json"]
    assert "truncated" in loaded.unreadable[0].reason
    assert loaded.missing[0].reason == "failed: RuntimeError: out of memory at step 12_000"


def test_load_records_of_an_empty_folder_names_folder_and_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}.*python -m experiments\.run"):
        load_records(tmp_path)


@pytest.mark.parametrize("newer_first", [True, False])
def test_load_records_with_two_of_one_configuration_takes_the_newer(
    records: Records, write_records: Callable[[Records], Path], newer_first: bool
) -> None:
    newer = copy.deepcopy(records[0])
    newer["id"] = ("0" if newer_first else "z") * 16
    newer["provenance"]["started"] = "2026-11-22T10:00:00"
    records[0]["id"] = "5" * 16
    loaded = load_records(write_records([records[0], newer]) / "records")
    assert [record["id"] for record in loaded.finished] == [newer["id"]]
    assert "5" * 16 in loaded.superseded[0].name


@pytest.mark.parametrize(
    ("files", "kept"), [(("x", "y"), "ab"), (("x", "x"), "b"), ((None, None), "b"), ((None, "x"), "ab")]
)
def test_load_records_keeps_one_record_of_each_version_of_the_models_files(
    records: Records, write_records: Callable[[Records], Path], files: tuple[str | None, ...], kept: str
) -> None:
    made = [copy.deepcopy(records[0]) for _ in files]
    for name, record, version in zip("ab", made, files, strict=True):
        record["id"], record["provenance"]["started"] = name * 16, f"2026-11-2{ord(name) - 96}T10:00:00"
        record["model"]["files"] = version and {"model.path": version * 16}
    loaded = load_records(write_records(made) / "records")
    assert [record["id"] for record in loaded.finished] == [name * 16 for name in kept]


def test_load_records_keeps_a_record_of_other_data(records: Records, write_records: Callable[[Records], Path]) -> None:
    newer = copy.deepcopy(records[0])
    newer["id"], newer["provenance"]["started"], newer["data"]["fingerprint"] = (
        "f" * 16,
        "2026-11-22T10:00:00",
        "another",
    )
    loaded = load_records(write_records([records[0], newer]) / "records")
    assert {record["id"] for record in loaded.finished} == {records[0]["id"], newer["id"]}
    assert not loaded.superseded


@pytest.mark.parametrize(("starts", "kept"), [((1, 2), "f"), ((2, 1), "fx"), ((1, 1), "f")])
def test_load_records_failed_record_never_replaces_a_finished_one(
    records: Records, write_records: Callable[[Records], Path], starts: tuple[int, int], kept: str
) -> None:
    finished = copy.deepcopy(records[0])
    failed, again = ({**fail(finished), "provenance": {"started": f"2026-11-2{starts[0]}"}, "id": n * 16} for n in "wx")
    finished["id"], finished["provenance"]["started"] = "f" * 16, f"2026-11-2{starts[1]}T10:00:00"
    loaded = load_records(write_records([finished, failed, again]) / "records")
    assert [record["id"] for record in (*loaded.finished, *loaded.failed)] == [name * 16 for name in kept]
    assert len(loaded.superseded) == 3 - len(kept)


def test_load_records_fills_in_settings_younger_than_a_record(
    records: Records, write_records: Callable[[Records], Path]
) -> None:
    """The record is the same cell as a newer one with the old value, and another cell than one with a new value."""
    older, same, other = (copy.deepcopy(records[0]) for _ in range(3))
    for name, record in (("a", older), ("b", same), ("c", other)):
        record["id"], record["provenance"]["started"] = name * 16, f"2026-11-2{ord(name) - 96}T10:00:00"
    older["config"]["train"].pop("prefusion_learning_rate", None)
    same["config"]["train"]["prefusion_learning_rate"] = None
    other["config"]["train"]["prefusion_learning_rate"] = 1e-4
    without_train = copy.deepcopy(records[0])
    without_train["id"], without_train["config"]["train"] = "d" * 16, None
    loaded = load_records(write_records([older, same, other, without_train]) / "records")
    assert [record["id"] for record in loaded.finished] == [same["id"], other["id"], without_train["id"]]


def patch_words(**changed: Any) -> dict[str, Any]:
    """Return a `patch_words` part of two images and six layers.

    Args:
        changed: Fields that differ.
    """
    lens = {"right": [1, 0], "chance": 0.2}
    part = {"label": "object", "images": 2, "patches": [3, 1], "corpus_words": 9}
    return part | {"depths": [{"logit": lens, "contextual": lens}] * 7} | changed


def test_check_record_with_words_of_patches_accepts_it(probed: dict[str, Any]) -> None:
    check_record(probed | {"patch_words": patch_words()})
    check_record(probed | {"photo_readout": {"grids": [PHOTO_READOUT]}})


def swaps(points: int, layer: int | None, **changed: Any) -> dict[str, Any]:
    """Return a `swaps` part of one property.

    Args:
        points: Points of its curves.
        layer: Its reading layer.
        changed: Fields that differ.
    """
    curves = {name: [0.5] * points for name in ("moved", "moved_low", "moved_high", "flipped")}
    fields = {"layer": layer, "low": layer, "high": layer, "pairs": 20, "right": 18, "chance": 0.01}
    return {"properties": {"colour": fields | curves | changed}}


def generated_part(examples: int) -> dict[str, Any]:
    """Return generated answers of ten-annotator questions with a blind control."""
    scores = [0.0, 0.3, 0.6, 0.9, 1.0]
    view = {"answers": ["a cat"] * examples, "scores": [scores[i % 5] for i in range(examples)]}
    return {"metric": "vqa", "references": 10, "max_new_tokens": 16, "image": view, "blank": copy.deepcopy(view)}


def test_check_record_with_generated_answers_accepts_them(probed: dict[str, Any]) -> None:
    check_record({**probed, "generated": generated_part(probed["data"]["examples"])})
    check_record({**probed, "generated": None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda part: part["image"]["answers"].pop(), r"generated\.image\.answers: has \d+ entries"),
        (lambda part: part["blank"]["scores"].append(1.0), r"generated\.blank\.scores: has \d+ entries"),
        (lambda part: part["image"]["scores"].__setitem__(2, 0.5), r"generated\.image\.scores\[2\]: .*found 0\.5"),
        (lambda part: part.update(references=1), r"generated\.image\.scores\[1\]: .*found 0\.3"),
        (lambda part: part.update(metric="exact"), r"generated\.metric: .*'exact'"),
    ],
)
def test_check_record_with_wrong_generated_answers_names_field_and_value(
    probed: dict[str, Any], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    part = generated_part(probed["data"]["examples"])
    change(part)
    with pytest.raises(ValueError, match=message):
        check_record({**probed, "generated": part})


def test_check_record_with_swaps_accepts_them_with_and_without_a_layer(probed: dict[str, Any]) -> None:
    check_record(probed | {"swaps": swaps(7, 2)})
    check_record(probed | {"swaps": swaps(0, None)})


def without_field(path: str) -> Callable[[dict[str, Any]], None]:
    """Return a function that removes a field of a record.

    Args:
        path: Its dotted name.
    """

    def change(record: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for key in parents:
            record = record[key]
        del record[last]

    return change


PHOTO_READOUT = {"grid_size": 2, "photographs": 4, "correct": "0110", "control": "1000"}


def with_value(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Return a function that sets a field of a record.

    Args:
        path: Its dotted name.
        value: The new value.
    """

    def change(record: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for key in parents:
            record = record[key]
        record[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_value("schema", 2), "schema: .*2"),
        (with_value("status", "running"), "status: .*'running'"),
        (without_field("status"), "status: .*None"),
        (without_field("config"), "config: is missing"),
        (without_field("model.layers"), "model.layers: is missing"),
        (with_value("model.layers", "six"), "model.layers: .*'six'"),
        (
            with_value("contribution", {"pairs": [["a", "b"]], "samples": 1, "share": [[[0.5]]], "by_head": []}),
            r"contribution.share: .*\(1, 6, 1\)",
        ),
        (
            with_value(
                "sinks", {"targets": [], "samples": 1, "by_attention": [[0]] * 6, "by_value": [[0]], "mass": []}
            ),
            "sinks.by_value: .*6 rows",
        ),
        (with_value("swaps", swaps(7, 2, flipped=[0.5])), "swaps.properties.colour.flipped: has 1 points, not 7"),
        (with_value("swaps", swaps(7, None)), "swaps.properties.colour.moved: has 7 points, not 0"),
        (with_value("swaps", swaps(7, 2, chance=1.5)), "swaps.properties.colour.chance: .*1.5"),
        (with_value("onset", {"upto": [{"layers": [0], "correct": ""}] * 2}), "onset.upto: .*all 6"),
        (with_value("data.examples", True), "data.examples: .*True"),
        (with_value("accuracy.image", "01"), "accuracy.image: .*2 outcomes for 120"),
        (with_value("accuracy.blank", "x" * 120), "accuracy.blank: .*'xxx"),
        (with_value("data.kinds", ["place"]), "data.kinds: .*1 entries for 120"),
        (with_value("cost.flops", None), "cost.flops: .*None"),
        (with_value("cost.cache_bytes", "12"), "cost.cache_bytes.*: .*'12'"),
        (with_value("removal.onward", []), "removal.onward: .*\\[\\]"),
        (with_value("removal.onward", [{"layers": [0], "correct": "1" * 120}]), "removal.onward: .*6 layers"),
        (
            with_value("removal.inside", [{"layers": [9], "correct": "1" * 120}]),
            r"removal.inside\[0\].layers: \[9\].*6",
        ),
        (with_value("removal.inside", [{"layers": [], "correct": "1" * 120}]), r"removal.inside: .*without layers"),
        (with_value("attention.mass", [[[0.1]]]), r"attention.mass: .*\(3, 6, 40\), found \(1, 1, 1\)"),
        (with_value("attention.entropy", [[[1.0]], [[1.0, 2.0]]]), r"attention.entropy: .*\(3, 6, 40\)"),
        (with_value("attention.entropy", [["a"]]), r"attention.entropy\[0\]\[0\]: .*'a'"),
        (with_value("knockout.width", 1), "knockout.windows: .*windows of 1 of 6"),
        (with_value("knockout.windows", [{"layers": [], "correct": "1" * 120}]), "knockout.windows: .*windows of 2"),
        (with_value("readout.depths", []), "readout.depths: .*0 entries.*6 layers"),
        (with_value("readout.samples", 5), r"readout.depths\[0\].correct: .*117 outcomes for 5"),
        (with_value("lens.depths", []), "lens.depths: .*0 entries.*6 layers"),
        (with_value("lens.samples", 5), r"lens.depths\[0\].correct: .*120 outcomes for 5"),
        (lambda record: record["lens"]["depths"][2].pop("logprob"), r"lens.depths\[2\].logprob: is missing"),
        (
            with_value("photo_readout", {"grids": [PHOTO_READOUT | {"photographs": 8}]}),
            "photo_readout.2.correct: .*4 outcomes for 8",
        ),
        (
            with_value("photo_readout", {"grids": [PHOTO_READOUT | {"correct": "x"}]}),
            r"photo_readout.grids\[0\].correct: .*'x'",
        ),
        (with_value("patch_words", patch_words(depths=[])), "patch_words.depths: .*0 entries.*6 layers"),
        (with_value("patch_words", patch_words(patches=[3])), "patch_words.patches: .*1 counts for 2 images"),
        (with_value("patch_words", patch_words(patches=[0, 9])), r"patch_words.depths\[0\].logit.right: .*more"),
        (without_field("fusion.removal.layers"), "fusion.removal.layers: is missing"),
        (with_value("fusion.removal.low", None), "fusion.removal: .*no interval"),
    ],
)
def test_check_record_with_a_wrong_field_names_field_and_value(
    probed: dict[str, Any], change: Callable[[dict[str, Any]], None], message: str
) -> None:
    check_record(probed)
    change(probed)
    with pytest.raises(ValueError, match=message) as error:
        check_record(probed)
    assert "\n" not in str(error.value)


def test_check_record_without_optional_parts_passes(probed: dict[str, Any]) -> None:
    for path in ("removal.random_inside", "attention.control", "attention.uniform_mass", "data.guess", "cost"):
        without_field(path)(probed)
    probed["accuracy"] = {"image": probed["accuracy"]["image"]}
    probed["fusion"]["attention"] = None
    check_record(probed)


def test_read_record_with_old_settings_returns_them_under_their_new_names(
    records: Records, write_records: Callable[[Records], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renamed_keys, "_ADDED", {"train.prefusion_learning_rate": None})
    old = records[0]
    old["config"] = {
        "seed": 0,
        "data": {"train": 8, "test": 4, "seed": 1},
        "train": {"steps": 60, "optimizer": "adamw", "bf16": True},
        "model": {"tower": {"steps": 600, "batch_size": 64}},
        "prefusion": {"place": "inside"},
    }
    (path,) = (write_records([old]) / "records").iterdir()
    assert read_record(path)["config"] == {
        "seed": 0,
        "data": {"train_samples": 8, "test_samples": 4, "seed": 1},
        "train": {"max_steps": 60, "optim": "adamw", "bf16": True, "prefusion_learning_rate": None},
        "model": {"vision_pretraining": {"max_steps": 600, "batch_size": 64}},
        "prefusion": {"location": "inside"},
    }


def test_json_schema_accepts_every_committed_record() -> None:
    """jsonschema checks the records with the schema in the docs, independently of pydantic."""
    schema = json.loads((ROOT / "docs" / "record.schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    paths = sorted((ROOT / "results").glob("**/records/*.json"))
    assert len(paths) > 100
    for path in paths[::10]:
        assert not list(validator.iter_errors(json.loads(path.read_text()))), path


def test_json_schema_in_the_docs_is_current() -> None:
    assert json.loads((ROOT / "docs" / "record.schema.json").read_text()) == json_schema()
