"""Data of `data=llava_json`, from the settings to the record of a cell."""

import json

import pytest
from PIL import Image

from experiments.config.data_schema import LlavaJsonData
from experiments.config.plain import from_plain, to_plain
from experiments.config.renamed_keys import migrate
from experiments.data.load import clear_data_cache, load_data
from experiments.records.files import read_record
from experiments.sweeps.plan import identify_cell
from experiments.sweeps.runner import run_if_needed

QUESTION = "what shape is right of the green ring?"
TURNS = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "cross"}]


@pytest.fixture
def folder(tmp_path):
    """A training file of 8 entries, of which 2 are bad, and a test file of 5, of which 1 is."""
    for split, size, bad in (("train", 8, (2, 5)), ("test", 5, (1,))):
        (tmp_path / split).mkdir()
        for i in range(size):
            Image.new("RGB", (48, 48), (10 * i, 0, 0)).save(tmp_path / split / f"{i}.png")
        for i in bad:
            path = tmp_path / split / f"{i}.png"
            path.write_bytes(path.read_bytes()[:60])
        entries = [{"id": f"{split}-{i}", "image": f"{i}.png", "conversations": TURNS} for i in range(size)]
        (tmp_path / f"{split}.json").write_text(json.dumps(entries))
    return tmp_path


def settings(folder, **other):
    return {
        "data": "llava_json",
        "data.path": f"{folder}/train.json",
        "data.images": f"{folder}/train",
        "data.test_path": f"{folder}/test.json",
        "data.test_images": f"{folder}/test",
        "results": f"{folder}/results",
        "model": "tiny",
        "device": "cpu",
        **other,
    }


def overrides(folder, **other):
    return [f"{key}={value}" for key, value in settings(folder, **other).items()]


TRAINING = {"train.max_steps": 2, "train.batch_size": 4, "train.warmup_steps": 0}


def test_cell_with_skip_records_and_lists_the_entries_left_out(compose_config, folder):
    cell = identify_cell(compose_config(*overrides(folder, **{"data.bad": "skip"}, **TRAINING)))
    assert (len(cell.data.train), len(cell.data.test)) == (6, 4)
    run_if_needed(cell, record_input_errors=False)
    record = read_record(folder / "results" / "records" / f"{cell.id}.json")
    assert record["data"]["skipped"] == {"train": 2, "test": 1}
    assert record["data"]["examples"] == 4
    listed = [json.loads(line) for line in (folder / "results" / record["data"]["skipped_file"]).open()]
    assert [(e["split"], e["id"], e["path"]) for e in listed] == [
        ("train", "train-2", "2.png"),
        ("train", "train-5", "5.png"),
        ("test", "test-1", "1.png"),
    ]
    assert record["data"]["fingerprint"] in record["data"]["skipped_file"]


def test_cell_with_stop_ends_before_training_at_a_damaged_test_image(compose_config, folder, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("training started")

    monkeypatch.setattr("experiments.run_cell.train_llava", fail)
    cell = identify_cell(compose_config(*overrides(folder, **TRAINING)))
    with pytest.raises(ValueError, match=r"test\.json', entry 1 \(id test-1\): .*1\.png"):
        run_if_needed(cell, record_input_errors=False)


def test_cell_with_stop_ends_before_training_at_a_missing_training_image(compose_config, folder):
    (folder / "train" / "7.png").unlink()
    with pytest.raises(ValueError, match=r"train\.json', entry 7 \(id train-7\): no image '.*7\.png'.*data\.bad=skip"):
        identify_cell(compose_config(*overrides(folder, **TRAINING)))


def test_load_data_of_several_files_has_shares_and_folders_of_their_own(compose_config, folder):
    several = {
        "data.path": f"[{folder}/train.json,{folder}/test.json]",
        "data.images": f"[{folder}/train,{folder}/test]",
        "data.shares": "[1,0.4]",
        "data.bad": "skip",
    }
    config = compose_config(*overrides(folder, **several))
    data = identify_cell(config).data
    ids = [sample.id for sample in data.train.samples]
    assert sum(name.startswith("train") for name in ids) == 6
    assert 1 <= sum(name.startswith("test") for name in ids) <= 2  # 2 of 5 are drawn, of which one may be bad
    assert all(sample.image for sample in data.train.samples)
    assert from_plain(to_plain(config)).data.path == [f"{folder}/train.json", f"{folder}/test.json"]


def test_load_data_notices_a_change_in_any_of_several_files(folder):
    config = LlavaJsonData(
        name="llava_json",
        path=[f"{folder}/train.json", f"{folder}/more.json"],
        images=f"{folder}/train",
        test_path=f"{folder}/test.json",
        test_images=f"{folder}/test",
    )
    more = [{"image": "0.png", "conversations": TURNS}]
    (folder / "more.json").write_text(json.dumps(more))
    first = load_data(config)
    assert load_data(config) is first
    (folder / "more.json").write_text(json.dumps(more * 2))
    assert len(load_data(config).train) == len(first.train) + 1
    clear_data_cache()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"data.bad": "ignore"}, r"data\.bad: unknown 'ignore'"),
        ({"data.path": "[]"}, r"data\.path: .*\[\]"),
        ({"data.path": "3"}, r"data\.path: .*3"),
        ({"data.images": "[a,1]"}, r"data\.images: .*1"),
        ({"data.shares": "[0]"}, r"data\.shares: .*0"),
        ({"data.test_path": "null", "data.path": "[a.json,b.json]"}, r"data\.test_path: missing"),
        ({"data.test_images": "null", "data.images": "[a,b]"}, r"data\.test_images: missing.* 2 folders"),
    ],
)
def test_settings_of_conversation_files_that_do_not_fit_are_refused(compose_config, folder, other, message):
    with pytest.raises(ValueError, match=message):
        identify_cell(compose_config(*overrides(folder, **other)))


def test_migrate_adds_the_settings_of_conversation_files_to_their_records_alone(folder):
    old = {"name": "llava_json", "path": "a.json", "images": "b", "frames": 8}
    assert migrate({"data": old})["data"].items() >= {**old, "bad": "stop", "shares": [], "test_images": None}.items()
    assert migrate({"data": old | {"bad": "skip"}})["data"]["bad"] == "skip"
    assert "bad" not in migrate({"data": {"name": "shapes"}})["data"]
