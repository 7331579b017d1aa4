from collections import Counter

import numpy as np
import pytest

from experiments.data.photo_questions import about_grid, about_one, description
from experiments.data.photos import load_photos

CLASSES = ["airplane", "cat", "dog"]
PARTS = ["one", "2x2", "3x3", "shapes"]


@pytest.fixture
def folder(photos):
    return photos


def load(folder, split, count, parts=PARTS, seed=0, side=12, patch=4, captions=False):
    return load_photos(str(folder), split, count, seed, parts, side, patch, captions)


def test_questions_about_a_known_grid():
    asked = {kind: dict(pairs) for kind, pairs in about_grid(["cat", "dog", "cat", "airplane"], CLASSES, 2).items()}
    assert asked["place"]["What is at row 2 column 1?"] == "cat"
    assert asked["where"] == {"Where is the dog?": "row 1 column 2", "Where is the airplane?": "row 2 column 2"}
    assert asked["count"] == {
        "How many pictures show an airplane?": "1",
        "How many pictures show a cat?": "2",
        "How many pictures show a dog?": "1",
    }
    assert asked["existence"]["Is there a dog?"] == "yes"
    assert asked["beside"]["What is below the dog?"] == "airplane"
    assert asked["beside"]["What is left of the airplane?"] == "cat"
    assert not any("cat?" in question for question in asked["beside"])
    assert asked["row"]["Which row holds the airplane?"] == "row 2"


def test_what_is_said_of_one_and_of_many():
    assert description(["airplane"], 1) == "A photo of an airplane."
    assert description(["cat", "dog", "cat", "airplane"], 2) == "Row 1: cat, dog. Row 2: cat, airplane."
    assert set(about_one("zebra")) == {"caption", "name"}  # nothing more is known of it
    assert dict(about_one("ship")["usual place"]) == {"Where does one usually see this?": "on the water"}


@pytest.mark.parametrize(("part", "grid"), [("one", 1), ("2x2", 2), ("3x3", 3)])
@pytest.mark.parametrize("side", [9, 12, 16])
def test_photographs_lie_where_the_answers_say_on_whole_patches(folder, part, grid, side):
    split = load(folder, "train", 5, [part], side=side)
    for sample in split.samples:
        pixels = np.asarray(sample.image)
        assert pixels.shape == (side * 4, side * 4, 3)
        patches = pixels[:, :, 0].reshape(side, 4, side, 4).swapaxes(1, 2).reshape(side, side, 16)
        assert (patches.min(-1) == patches.max(-1)).all()  # no patch holds two photographs
        middles = [(2 * i + 1) * side * 2 // grid for i in range(grid)]
        seen = [CLASSES[int(pixels[y, x, 0]) // 20 % 3] for y in middles for x in middles]
        known = about_one(seen[0]) if grid == 1 else about_grid(seen, CLASSES, grid)
        known["description"] = [("Describe the picture.", description(seen, grid))]
        for asked in zip(sample.questions, sample.answers, sample.kinds, strict=True):
            assert asked[:2] in known[asked[2]]
        assert (sample.kinds[-1] == "description") == (grid > 1)


def test_parts_in_turn_with_every_kind_of_question(folder):
    split = load(folder, "test", 120)
    assert [sample.id.split("-")[2:4] for sample in list(split.samples)[:4]] == [
        ["0", "1"],
        ["0", "2"],
        ["0", "3"],
        ["0", "0.4"],
    ]
    assert [sample.load[0].number for sample in split.samples] == list(range(split.images)) == list(range(120))
    assert all(len(sample.kinds) == 1 for sample in split.samples)
    kinds = Counter(sample.kinds[0] for sample in split.samples)
    ofgrids = {"place", "where", "count", "existence", "beside", "row"}
    ofone = {"caption", "name", "animal or vehicle", "usual place"}
    assert {kind for kind in kinds if not kind.startswith("shapes ")} <= ofgrids | ofone | {"caption"}
    assert ofgrids - {"where", "row"} <= set(kinds)  # three classes: what a grid shows once is rare
    assert len([kind for kind in kinds if kind.startswith("shapes ")]) == 6


def test_captions_are_descriptions_alone_and_the_test_stays(folder):
    told = load(folder, "train", 8, captions=True)
    assert {kind for sample in told.samples for kind in sample.kinds} == {"description", "shapes description"}
    asked, same = (load(folder, "test", 8, captions=captions) for captions in (False, True))
    assert [s.conversations for s in asked.samples] == [s.conversations for s in same.samples]


def test_deterministic_and_no_picture_in_two_splits(folder):
    first, second = (load(folder, "train", 8, seed=1) for _ in range(2))
    assert first.fingerprint == second.fingerprint != load(folder, "train", 8, seed=2).fingerprint
    assert [s.conversations for s in first.samples] == [s.conversations for s in second.samples]
    shown = {split: {s.image.tobytes() for s in load(folder, split, 12).samples} for split in ("train", "test")}
    assert not shown["train"] & shown["test"]


def test_fewer_pictures_than_parts(folder):
    assert [s.id for s in load(folder, "test", 2).samples] == ["photos-test-0-1-0.0", "photos-test-0-2-0.0"]


def test_wrong_settings_and_folders_are_refused(folder):
    for parts in ([], ["4x4"], ["one", "one"]):
        with pytest.raises(ValueError, match=r"data.parts: .* name some of one, 2x2, 3x3, shapes, each once"):
            load(folder, "test", 1, parts)
    with pytest.raises(ValueError, match=r"data.side=2 data.patch=4: 3 photographs a side need at least a patch each"):
        load(folder, "test", 1, side=2)
    (folder / "classes.json").write_text('["cat"]')
    with pytest.raises(ValueError, match="labels run to 2"):
        load(folder, "test", 1)
    (folder / "test.npz").write_bytes(b"garbled")
    with pytest.raises(ValueError, match="holds no images"):
        load(folder, "test", 1)
    (folder / "train.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file '.*train.npz'"):
        load(folder, "train", 1)
