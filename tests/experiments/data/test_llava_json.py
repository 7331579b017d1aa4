import json

import pytest
from PIL import Image

from experiments.data.llava_json import load_llava_json
from experiments.data.shapes import load_shapes

TURNS = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a cat"}]


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    return tmp_path


def write(folder, entries) -> str:
    path = folder / "data.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return str(path)


def test_what_shapes_makes_is_llava_json(tmp_path):
    made = load_shapes("test", 3)
    for sample in made.samples:
        sample.image.save(tmp_path / f"{sample.id}.png")
    path = write(
        tmp_path,
        [
            {"id": s.id, "image": f"{s.id}.png", "conversations": s.conversations, "kinds": s.kinds}
            for s in made.samples
        ],
    )
    for read, sample in zip(load_llava_json(path, str(tmp_path), "test").samples, made.samples, strict=True):
        assert (read.id, read.conversations, read.kinds) == (sample.id, sample.conversations, sample.kinds)
        assert read.image.tobytes() == sample.image.tobytes()


def test_count_and_fingerprint(folder):
    path = write(
        folder,
        [{"image": "a.png", "conversations": TURNS}, {"conversations": [TURNS[1] | {"from": "human"}, TURNS[1]]}],
    )
    both, one = load_llava_json(path, str(folder), "test"), load_llava_json(path, str(folder), "test", 1)
    assert (len(both), len(one)) == (2, 1)
    assert both.samples[1].image is None
    assert both.fingerprint != one.fingerprint


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ("[{", "is not JSON"),
        ({"a": 1}, "expected a list of conversations, found dict"),
        ([], "found none"),
        ([{"image": "a.png"}], "entry 0: not an object with a list"),
        ([{"image": "a.png", "conversations": TURNS[:1]}], "1 turns"),
        ([{"image": "a.png", "conversations": TURNS[::-1]}], 'turn 0: expected {"from": "human"'),
        ([{"image": "a.png", "conversations": [{"from": "human", "value": 3}, TURNS[1]]}], "turn 0"),
        ([{"conversations": TURNS}], "found 1"),
        ([{"image": "a.png", "conversations": [TURNS[1] | {"from": "human"}, TURNS[1]]}], "found 0"),
        ([{"image": "a.png", "conversations": TURNS, "kinds": []}], "there are 1 questions"),
    ],
)
def test_wrong_files_are_refused_in_one_line(folder, entries, said):
    with pytest.raises(ValueError, match=said.replace("{", r"\{")) as error:
        load_llava_json(write(folder, entries), str(folder), "test")
    assert "\n" not in str(error.value)
    assert "data.json" in str(error.value)


def test_missing_files(folder):
    path = write(folder, [{"image": "b.png", "conversations": TURNS}])
    with pytest.raises(FileNotFoundError, match=r"entry 0: no image '.*b.png'"):
        load_llava_json(path, str(folder), "test")
    with pytest.raises(FileNotFoundError, match=r"data.path: no file"):
        load_llava_json(str(folder / "none.json"), str(folder), "test")
    with pytest.raises(FileNotFoundError, match=r"data.images: no folder"):
        load_llava_json(path, str(folder / "none"), "test")


@pytest.mark.parametrize("content", [b"no image", b"\x89PNG\r\n\x1a\n broken"])
def test_an_image_that_is_none_is_named_when_it_is_read(folder, content):
    (folder / "a.png").write_bytes(content)
    sample = load_llava_json(write(folder, [{"image": "a.png", "conversations": TURNS}]), str(folder), "test").samples[
        0
    ]
    with pytest.raises(ValueError, match=r"a.png' cannot be read as an image"):
        _ = sample.image
