"""Validation splits: no image in common with training, and nothing changes without one."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments.config.data_schema import LlavaJsonData, PhotosData, ShapesData, ShapesVideoData
from experiments.data.held_out import hold_out
from experiments.data.load import load_data
from experiments.data.samples import Split, llava_conversation, single_questions
from experiments.data.shapes import load_shapes


def divide(media, count, seed=0):
    """Return the numbers of the entries that remain for training, and of those held out."""
    split = Split("train", list(range(len(media))), "f")
    return [list(part.samples) for part in hold_out(split, media, count, seed)]


def test_hold_out_keeps_entries_with_a_common_file_together():
    media = [["a"], ["b", "c"], ["./c"], ["c", "d"], ["d"], ["e"], [], ["f"]]
    for seed in range(20):
        rest, held = divide(media, 2, seed)
        assert sorted(rest + held) == list(range(8))
        assert len(held) >= 2
        assert {1, 2, 3, 4} <= set(rest) or {1, 2, 3, 4} <= set(held)
    assert len({tuple(divide(media, 2, seed)[1]) for seed in range(20)}) > 3
    assert divide(media, 2, 5) == divide(media, 2, 5)


def test_hold_out_keeps_names_of_one_file_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    media = [["photos/a.png"], [str(tmp_path / "photos" / "a.png")], ["photos/b.png"], ["photos/c.png"]]
    for seed in range(20):
        rest, held = divide(media, 1, seed)
        assert {0, 1} <= set(rest) or {0, 1} <= set(held)


def test_hold_out_of_a_share_holds_out_that_many_entries():
    _, held = divide([[str(i)] for i in range(1000)], 100)
    assert len(held) == 100
    assert np.mean(held) == pytest.approx(499.5, abs=100)  # from all of the file, not from its end


@pytest.mark.parametrize("media", [[["a"], ["a"]], [["a"], ["b"]]])
def test_hold_out_of_all_entries_raises(media):
    with pytest.raises(ValueError, match=r"data\.validation_samples: 2 of 2"):
        divide(media, 2)


@pytest.fixture
def configs(tmp_path):
    """A data config of each kind, with a validation split of 6."""
    for split, seed in (("train", 0), ("test", 1)):
        rng = np.random.default_rng(seed)
        images = rng.integers(256, size=(40, 8, 8, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{split}.npz", images=images, labels=np.arange(40) % 3)
        entries = []
        for i in range(12):
            Image.fromarray(images[i // 2]).save(tmp_path / f"{split}{i // 2}.png")
            turns = llava_conversation([(f"what is {i}?", "a cat"), (f"and {i}?", "a dog")])
            entries.append({"image": f"{split}{i // 2}.png", "conversations": turns})
        (tmp_path / f"{split}.json").write_text(json.dumps(entries))
    (tmp_path / "classes.json").write_text(json.dumps(["airplane", "cat", "dog"]))
    counts = {"train_samples": 12, "test_samples": 6, "validation_samples": 6}
    folder = str(tmp_path)
    return {
        "shapes": ShapesData("shapes", **counts),
        "shapes_video": ShapesVideoData("shapes_video", **counts),
        "photos": PhotosData("photos", **counts, photos=folder, parts=["one", "2x2"], side=4, patch=2),
        "llava_json": LlavaJsonData(
            "json",
            **counts | {"test_samples": 0},
            path=f"{folder}/train.json",
            test_path=f"{folder}/test.json",
            images=folder,
        ),
    }


def pixels(split: Split) -> set[bytes]:
    """Return the pixels of every image and frame of a split."""
    visual_inputs = [visual for sample in split.samples for visual in sample.visual_inputs]
    frames = [[visual] if isinstance(visual, Image.Image) else visual for visual in visual_inputs]
    return {image.tobytes() for images in frames for image in images}


@pytest.mark.parametrize("name", ["shapes", "shapes_video", "photos", "llava_json"])
def test_load_data_with_validation_samples_shares_no_image_between_splits(configs, name):
    config = configs[name]
    data = load_data(config)
    assert data.validation.name == "validation"
    assert len(data.validation) == 6
    assert len(data.train) == (6 if name == "llava_json" else 12)
    shown = [pixels(split) for split in (data.train, data.validation, data.test)]
    assert not shown[0] & shown[1]
    assert not shown[2] & (shown[0] | shown[1])


def test_load_photos_uses_each_photograph_in_one_split(configs):
    data = load_data(configs["photos"])
    used = [
        {photo.tobytes() for _, part in split.samples.parts for photo in photographs(part).images}
        for split in (data.train, data.validation, data.test)
    ]
    assert [len(photos) for photos in used] == [36, 4, 40]
    assert len(set.union(*used)) == 80


def photographs(part):
    """Return the photographs that a part of a split draws from."""
    return getattr(part, "samples", part).photos


@pytest.mark.parametrize("name", ["shapes", "shapes_video", "photos"])
def test_load_data_of_generated_data_asks_one_validation_question_of_each_image(configs, name):
    assert len(list(single_questions(load_data(configs[name]).validation.samples))) == 6


@pytest.mark.parametrize("name", ["shapes", "shapes_video", "photos", "llava_json"])
def test_load_data_fingerprint_depends_on_the_validation_split(configs, name):
    config, prints = configs[name], []
    for count in (0, 4, 6):
        config.validation_samples = count
        prints.append(load_data(config).fingerprint)
    assert len(set(prints)) == 3


def test_load_data_without_validation_samples_returns_the_same_training_split():
    data = load_data(ShapesData("shapes", train_samples=4, test_samples=4))
    assert data.validation is None
    assert data.train.fingerprint == load_shapes("train", 4).fingerprint


def test_load_data_holds_out_of_a_training_split_alone(configs):
    config = configs["llava_json"]
    config.test_path = None
    with pytest.raises(ValueError, match=r"data\.validation_samples: 6 .*data\.test_path"):
        load_data(config)


def test_data_config_with_negative_validation_samples_raises():
    with pytest.raises(ValueError, match=r"data\.validation_samples: .*found -1"):
        ShapesData("shapes", validation_samples=-1)
