"""Photographs on grids and questions about them."""

import re
from collections import Counter

import numpy as np
import pytest

from experiments.data.photo_questions import describe_photos, photo_grid_questions, single_photo_questions
from experiments.data.photos import load_photos

CLASSES = ["airplane", "cat", "dog"]
PARTS = ["one", "2x2", "3x3", "shapes"]


def load(photos, split, count, parts=PARTS, seed=0, side=12, patch=4, captions=False):
    return load_photos(str(photos), split, count, seed, parts, side, patch, captions)


def test_photo_grid_questions_of_a_known_grid():
    names = ["cat", "dog", "cat", "airplane"]
    questions = {name: dict(pairs) for name, pairs in photo_grid_questions(names, CLASSES, 2).items()}
    assert questions["place"]["What is at row 2 column 1?"] == "cat"
    assert questions["where"] == {"Where is the dog?": "row 1 column 2", "Where is the airplane?": "row 2 column 2"}
    assert questions["count"] == {
        "How many pictures show an airplane?": "1",
        "How many pictures show a cat?": "2",
        "How many pictures show a dog?": "1",
    }
    assert questions["existence"]["Is there a dog?"] == "yes"
    assert questions["beside"]["What is below the dog?"] == "airplane"
    assert questions["beside"]["What is left of the airplane?"] == "cat"
    assert not any("cat?" in question for question in questions["beside"])
    assert questions["row"]["Which row holds the airplane?"] == "row 2"


def test_describe_photos_and_single_photo_questions_of_known_classes():
    assert describe_photos(["airplane"], 1) == "A photo of an airplane."
    assert describe_photos(["cat", "dog", "cat", "airplane"], 2) == "Row 1: cat, dog. Row 2: cat, airplane."
    assert set(single_photo_questions("zebra")) == {"caption", "name"}  # no facts about this class
    assert dict(single_photo_questions("ship")["usual place"]) == {"Where does one usually see this?": "on the water"}


@pytest.mark.parametrize(("part", "grid"), [("one", 1), ("2x2", 2), ("3x3", 3)])
@pytest.mark.parametrize("side", [9, 12, 16])
def test_load_photos_puts_each_photograph_on_whole_patches_where_answers_place_it(photos, part, grid, side):
    split = load(photos, "train", 5, [part], side=side)
    for sample in split.samples:
        pixels = np.asarray(sample.image)
        assert pixels.shape == (side * 4, side * 4, 3)
        patches = pixels[:, :, 0].reshape(side, 4, side, 4).swapaxes(1, 2).reshape(side, side, 16)
        assert (patches.min(-1) == patches.max(-1)).all()  # no patch holds two photographs
        middles = [(2 * i + 1) * side * 2 // grid for i in range(grid)]
        shown = [CLASSES[int(pixels[y, x, 0]) // 20 % 3] for y in middles for x in middles]
        expected = single_photo_questions(shown[0]) if grid == 1 else photo_grid_questions(shown, CLASSES, grid)
        expected["description"] = [("Describe the picture.", describe_photos(shown, grid))]
        for question, answer, question_type in zip(
            sample.questions, sample.answers, sample.question_types, strict=True
        ):
            assert (question, answer) in expected[question_type]
        assert (sample.question_types[-1] == "description") == (grid > 1)


def test_load_photos_takes_the_parts_in_turn(photos):
    split = load(photos, "test", 120)
    assert [sample.id.split("-")[0] for sample in list(split.samples)[:4]] == [*["photos"] * 3, "shapes"]
    assert [sample.id.split("-")[3] for sample in list(split.samples)[:3]] == ["1", "2", "3"]  # photographs a side
    assert [sample.loaders[0].index for sample in split.samples] == list(range(split.image_count)) == list(range(120))
    assert all(len(sample.question_types) == 1 for sample in split.samples)
    types = Counter(sample.question_types[0] for sample in split.samples)
    grid_types = {"place", "where", "count", "existence", "beside", "row"}
    single_types = {"caption", "name", "animal or vehicle", "usual place"}
    assert {name for name in types if not name.startswith("shapes ")} <= grid_types | single_types | {"caption"}
    assert grid_types - {"where", "row"} <= set(types)  # with three classes a grid rarely shows one exactly once
    assert len([name for name in types if name.startswith("shapes ")]) == 6


def test_load_photos_with_captions_describes_training_images_and_keeps_the_test_split(photos):
    described = load(photos, "train", 8, captions=True)
    assert {name for sample in described.samples for name in sample.question_types} == {
        "description",
        "shapes description",
    }
    without, with_captions = (load(photos, "test", 8, captions=captions) for captions in (False, True))
    assert [s.conversations for s in without.samples] == [s.conversations for s in with_captions.samples]


def test_load_photos_is_deterministic_and_splits_share_no_image(photos):
    first, second = (load(photos, "train", 8, seed=1) for _ in range(2))
    assert first.fingerprint == second.fingerprint != load(photos, "train", 8, seed=2).fingerprint
    assert [s.conversations for s in first.samples] == [s.conversations for s in second.samples]
    shown = {split: {s.image.tobytes() for s in load(photos, split, 12).samples} for split in ("train", "test")}
    assert not shown["train"] & shown["test"]


def test_load_photos_of_fewer_images_than_parts_uses_the_first_parts(photos):
    assert [s.id for s in load(photos, "test", 2).samples] == ["photos-test-0-1-0.0", "photos-test-0-2-0.0"]


def test_images_of_the_same_photographs_have_equal_loaders(photos):
    split = load(photos, "test", 60, parts=["one"])
    assert split.image_count == 60
    loaders = [sample.loaders[0] for sample in split.samples]
    images = [load_image().tobytes() for load_image in loaders]
    assert len(set(loaders)) == len(set(images)) < 60  # few photographs, so that they are drawn repeatedly


def test_load_photos_with_wrong_settings_or_files_raises(photos):
    for parts in ([], ["4x4"], ["one", "one"]):
        with pytest.raises(ValueError, match=rf"data\.parts: .*one, 2x2, 3x3, shapes.*{re.escape(str(parts))}"):
            load(photos, "test", 1, parts)
    with pytest.raises(ValueError, match=r"data\.side=2 data\.patch=4: .* 3"):
        load(photos, "test", 1, side=2)
    (photos / "classes.json").write_text('["cat"]')
    with pytest.raises(ValueError, match=r"test\.npz.* 2, .*classes\.json.* 1 names"):
        load(photos, "test", 1)
    (photos / "test.npz").write_bytes(b"garbled")
    with pytest.raises(ValueError, match=r"data\.photos: '.*test\.npz' holds no arrays"):
        load(photos, "test", 1)
    (photos / "train.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file '.*train.npz'"):
        load(photos, "train", 1)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage(path):
    """Change bytes of the images, which the archive's checksums find."""
    content = bytearray(path.read_bytes())
    content[1000:1010] = b"\1" * 10
    path.write_bytes(content)


def relabel(labels):
    return lambda path: np.savez(path, images=np.load(path)["images"], labels=labels)


@pytest.mark.parametrize(
    ("file", "spoil", "message"),
    [
        ("test.npz", cut, "holds no arrays images and labels"),
        ("test.npz", damage, "holds no arrays images and labels"),
        ("test.npz", relabel(np.zeros((12, 1), int)), r"labels int \[n\], found int64 \(12, 1\)"),
        ("test.npz", relabel(np.zeros(12)), r"labels int \[n\], found float64 \(12,\)"),
        ("test.npz", relabel(np.array(3)), r"labels int \[n\], found int64 \(\)"),
        ("classes.json", lambda path: path.write_text("["), "holds no list of class names"),
        ("classes.json", lambda path: path.write_text('{"0": "cat"}'), "a list of class names, found {'0': 'cat'}"),
        ("classes.json", lambda path: path.write_text("[1, 2, 3]"), r"a list of class names, found \[1, 2, 3\]"),
    ],
    ids=["cut", "damaged", "column", "float", "scalar", "no JSON", "mapping", "numbers"],
)
def test_load_photos_with_a_wrong_file_names_it_in_one_line(photos, file, spoil, message):
    spoil(photos / file)
    with pytest.raises(ValueError, match=f"data.photos: '.*{file}'.* {message}") as error:
        load(photos, "test", 1)
    assert "\n" not in str(error.value)
