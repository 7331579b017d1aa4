import json

import av
import numpy as np
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
    assert both.samples[1].load == ()
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
        ([{"conversations": TURNS}], "entry 0: its questions need one <image> for each of its 0 images, found 1"),
        ([{"image": "a.png", "conversations": [TURNS[1] | {"from": "human"}, TURNS[1]]}], "1 images, found 0"),
        ([{"image": ["a.png"] * 2, "conversations": TURNS}], "2 images, found 1"),
        ([{"video": "a.mp4", "conversations": [TURNS[1] | {"from": "human"}, TURNS[1]]}], "1 videos, found 0"),
        ([{"image": "a.png", "video": "a.mp4", "conversations": TURNS}], "<video> for each of its 1 videos, found 0"),
        ([{"image": {"path": "a.png"}, "conversations": TURNS}], '"image" is a path or a list of paths'),
        ([{"image": "a.png", "conversations": [TURNS[0], TURNS[1] | {"value": "<image>"}]}], "turn 1: an answer holds"),
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
    path = write(folder, [{"video": ["b.mp4"], "conversations": TURNS}])
    with pytest.raises(FileNotFoundError, match=r"entry 0: no video '.*b.mp4'"):
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
    with pytest.raises(ValueError, match=r"a.png cannot be read as an image|a.png .* cannot be turned into RGB"):
        _ = sample.pictures


@pytest.fixture
def film(folder):
    """40 frames without loss; frame i has the grey level 6 * i."""
    with av.open(str(folder / "film.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "bgr0"
        for i in range(40):
            image = np.full((32, 32, 3), 6 * i, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return "film.mkv"


@pytest.mark.parametrize("slot", ["<image>", "<video>"])
def test_a_video_gives_eight_frames_spread_evenly(folder, film, slot):
    """Written either way, as in the released data; frames are those in the middle of eight equal parts, which are
    bounded by 0, 5, 10, 15, 20, 24, 29, 34 and 39."""
    turns = [{"from": "human", "value": f"what?\n{slot}"}, {"from": "gpt", "value": "a cat"}]
    path = write(folder, [{"video": film, "conversations": turns}])
    sample = load_llava_json(path, str(folder), "test").samples[0]
    assert sample.slots == ["<video>"]
    assert sample.questions == ["what?"]
    (video,) = sample.pictures
    assert [np.asarray(frame).mean() / 6 for frame in video] == [2, 7, 12, 17, 22, 26, 31, 36]


def test_pictures_stand_in_the_order_of_their_slots(folder, film):
    Image.new("RGB", (4, 4)).save(folder / "b.png")
    turns = [
        {"from": "human", "value": "<image>\n<video>\nwhat?"},
        {"from": "gpt", "value": "a cat"},
        {"from": "human", "value": "<image>\nand here?"},
        {"from": "gpt", "value": "none"},
    ]
    path = write(folder, [{"image": ["a.png", "b.png"], "video": [film], "conversations": turns}])
    first, video, second = load_llava_json(path, str(folder), "test", frames=3).samples[0].pictures
    assert (first.size, len(video), second.size) == ((8, 8), 3, (4, 4))


def test_the_fingerprint_knows_the_frames_of_videos_alone(folder, film):
    for name, entry in (("film", {"video": film}), ("image", {"image": "a.png"})):
        path = write(folder, [entry | {"conversations": TURNS}])
        two, four = (load_llava_json(path, str(folder), "test", frames=n).fingerprint for n in (2, 4))
        assert (two == four) == (name == "image")
    with pytest.raises(ValueError, match=r"data.frames: 0 frames"):
        load_llava_json(path, str(folder), "test", frames=0)
