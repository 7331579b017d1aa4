import json

import numpy as np
import pytest

from experiments.data.photo_grid import load_photo_grid, questions

CLASSES = ["airplane", "cat", "dog"]


@pytest.fixture
def folder(tmp_path):
    # photographs of one even colour, so that the sheet tells which photograph lies where
    labels = np.arange(12) % 3
    images = np.repeat(np.arange(12, dtype=np.uint8) * 20, 32 * 32 * 3).reshape(12, 32, 32, 3)
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", images=images, labels=labels)
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES))
    return tmp_path


def test_questions_about_a_known_grid():
    asked = {kind: dict(pairs) for kind, pairs in questions(["cat", "dog", "cat", "airplane"], CLASSES, 2).items()}
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


@pytest.mark.parametrize("grid", [2, 3])
def test_photographs_lie_where_the_answers_say(folder, grid):
    split = load_photo_grid(str(folder), "test", 5, 0, grid, 16)
    for i in range(len(split)):
        pixels = np.asarray(split.samples[i].image)
        assert pixels.shape == (16 * grid, 16 * grid, 3)
        seen = [CLASSES[int(pixels[r * 16 + 8, c * 16 + 8, 0]) // 20 % 3] for r in range(grid) for c in range(grid)]
        for question, answer, kind in zip(
            split.samples[i].questions, split.samples[i].answers, split.samples[i].kinds, strict=True
        ):
            assert (question, answer) in questions(seen, CLASSES, grid)[kind]


def test_deterministic(folder):
    first, second = (load_photo_grid(str(folder), "train", 4, 1, 2, 16) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert [s.conversations for s in first.samples] == [s.conversations for s in second.samples]


def test_wrong_folders_are_refused(folder):
    with pytest.raises(ValueError, match="2 or more"):
        load_photo_grid(str(folder), "test", 1, 0, 1, 16)
    (folder / "classes.json").write_text('["cat"]')
    with pytest.raises(ValueError, match="labels run to 2"):
        load_photo_grid(str(folder), "test", 1, 0, 2, 16)
    (folder / "test.npz").write_bytes(b"garbled")
    with pytest.raises(ValueError, match="holds no images"):
        load_photo_grid(str(folder), "test", 1, 0, 2, 16)
    (folder / "train.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file '.*train.npz'"):
        load_photo_grid(str(folder), "train", 1, 0, 2, 16)
