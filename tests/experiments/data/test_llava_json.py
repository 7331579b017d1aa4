"""The reader of LLaVA-format JSON files."""

import json

import av
import numpy as np
import pytest
from PIL import Image

from experiments.data.llava_json import load_llava_json
from experiments.data.samples import llava_conversation, single_questions
from experiments.data.shapes import load_shapes

TURNS = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a cat"}]


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    return tmp_path


def write_json(folder, entries) -> str:
    """Write entries, or text as it is, to a file and return its path."""
    path = folder / "data.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return str(path)


def test_load_llava_json_of_written_shapes_returns_the_same_samples(tmp_path):
    generated = load_shapes("test", 3)
    for sample in generated.samples:
        sample.image.save(tmp_path / f"{sample.id}.png")
    path = write_json(
        tmp_path,
        [
            {"id": s.id, "image": f"{s.id}.png", "conversations": s.conversations, "kinds": s.question_types}
            for s in generated.samples
        ],
    )
    for read, sample in zip(load_llava_json(path, str(tmp_path), "test").samples, generated.samples, strict=True):
        assert (read.id, read.conversations, read.question_types) == (
            sample.id,
            sample.conversations,
            sample.question_types,
        )
        assert read.image.tobytes() == sample.image.tobytes()


def test_entries_of_one_image_have_equal_loaders(folder):
    """So that a read-out is not tested on an image that it was trained on."""
    entries = [{"id": name, "image": image, "conversations": TURNS} for name, image in (("x", "a.png"), ("y", "a.png"))]
    first, second = load_llava_json(write_json(folder, entries), str(folder), "test").samples
    assert first.loaders == second.loaders
    assert len({first.loaders, second.loaders}) == 1


def test_load_llava_json_with_a_count_returns_so_many_and_another_fingerprint(folder):
    path = write_json(
        folder,
        [{"image": "a.png", "conversations": TURNS}, {"conversations": [TURNS[1] | {"from": "human"}, TURNS[1]]}],
    )
    all_entries, first = load_llava_json(path, str(folder), "test"), load_llava_json(path, str(folder), "test", 1)
    assert (len(all_entries), len(first)) == (2, 1)
    assert all_entries.samples[1].loaders == ()
    assert all_entries.fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("[{", "is not JSON"),
        ({"a": 1}, "found dict"),
        ([], "found none"),
        ([{"image": "a.png"}], "entry 0: .*conversations"),
        ([{"image": "a.png", "conversations": TURNS[:1]}], "entry 0: .*1 turns"),
        ([{"image": "a.png", "conversations": TURNS[::-1]}], 'entry 0: turn 0: .*"from": "human"'),
        ([{"image": "a.png", "conversations": [{"from": "human", "value": 3}, TURNS[1]]}], "turn 0: .*found .*3"),
        ([{"conversations": TURNS}], "entry 0: .*<image>.* 0 images, found 1"),
        ([{"image": "a.png", "conversations": [TURNS[1] | {"from": "human"}, TURNS[1]]}], "1 images, found 0"),
        ([{"image": ["a.png"] * 2, "conversations": TURNS}], "2 images, found 1"),
        ([{"video": "a.mp4", "conversations": [TURNS[1] | {"from": "human"}, TURNS[1]]}], "1 videos, found 0"),
        ([{"image": "a.png", "video": "a.mp4", "conversations": TURNS}], "<video>.* 1 videos, found 0"),
        ([{"image": {"path": "a.png"}, "conversations": TURNS}], '"image" .*path.*found .*a.png'),
        ([{"image": "a.png", "conversations": [TURNS[0], TURNS[1] | {"value": "<image>"}]}], "turn 1: .*<image>"),
        ([{"image": "a.png", "conversations": [TURNS[0], TURNS[1] | {"value": "\ud83d"}]}], "turn 1: .*surrogate"),
        ([{"image": "", "conversations": TURNS}], "\"image\" must be a path.*found ''"),
        ([{"image": "s3://bucket/a.png", "conversations": TURNS}], "image 's3://bucket/a.png' is an address"),
        ([{"image": "a.png", "conversations": TURNS, "kinds": []}], r'"kinds".* 1 questions.*\[\]'),
        ([{"image": "a.png", "conversations": TURNS, "kinds": [0]}], r'entry 0: "kinds".* question 0 .*text.*found 0'),
        ([{"image": "a.png", "conversations": TURNS, "kinds": [None]}], r'entry 0: "kinds".*text.*found null'),
    ],
)
def test_load_llava_json_of_a_wrong_file_raises_one_line(folder, entries, message):
    with pytest.raises(ValueError, match=message) as error:
        load_llava_json(write_json(folder, entries), str(folder), "test")
    assert "\n" not in str(error.value)
    assert "data.json" in str(error.value)


def test_load_llava_json_names_samples_by_id_or_else_by_number(folder):
    ids = [7, "7", None, "x", "x"]
    path = write_json(folder, [{"id": name, "image": "a.png", "conversations": TURNS} for name in ids])
    samples = load_llava_json(path, str(folder), "test").samples
    assert [sample.id for sample in samples] == ["7", "7", "2", "x", "x"]


def test_load_llava_json_accepts_absolute_paths_and_paths_upwards(folder):
    (folder / "images").mkdir()
    paths = [str(folder / "a.png"), "../a.png"]
    path = write_json(folder, [{"image": image, "conversations": TURNS} for image in paths])
    samples = load_llava_json(path, str(folder / "images"), "test").samples
    assert [sample.image.size for sample in samples] == [(8, 8)] * 2


def test_load_llava_json_with_a_missing_file_names_it(folder):
    path = write_json(folder, [{"image": "b.png", "conversations": TURNS}])
    with pytest.raises(ValueError, match=r"entry 0: no image '.*b.png'"):
        load_llava_json(path, str(folder), "test")
    path = write_json(folder, [{"video": ["b.mp4"], "conversations": TURNS}])
    with pytest.raises(ValueError, match=r"entry 0: no video '.*b.mp4'"):
        load_llava_json(path, str(folder), "test")
    with pytest.raises(FileNotFoundError, match=r"data.path: no file"):
        load_llava_json(str(folder / "none.json"), str(folder), "test")
    with pytest.raises(FileNotFoundError, match=r"data.images: no folder"):
        load_llava_json(path, str(folder / "none"), "test")


@pytest.mark.parametrize("content", [b"no image", b"\x89PNG\r\n\x1a\n broken"])
def test_visual_inputs_of_an_unreadable_image_names_it(folder, content):
    (folder / "a.png").write_bytes(content)
    sample = load_llava_json(
        write_json(folder, [{"image": "a.png", "conversations": TURNS}]), str(folder), "test"
    ).samples[0]
    with pytest.raises(ValueError, match=r"a.png cannot be read as an image|a.png .* cannot be converted to RGB"):
        _ = sample.visual_inputs


@pytest.fixture
def clip(folder):
    """A lossless video of 40 frames; frame i has the grey level 6 * i."""
    with av.open(str(folder / "clip.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "bgr0"
        for i in range(40):
            image = np.full((32, 32, 3), 6 * i, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return "clip.mkv"


@pytest.mark.parametrize("placeholder", ["<image>", "<video>"])
def test_load_llava_json_of_a_video_takes_eight_evenly_spaced_frames(folder, clip, placeholder):
    """Both placeholders occur in the released data. Frames lie in the middle of eight equal parts.

    The parts are bounded by 0, 5, 10, 15, 20, 24, 29, 34 and 39.
    """
    turns = [{"from": "human", "value": f"what?\n{placeholder}"}, {"from": "gpt", "value": "a cat"}]
    path = write_json(folder, [{"video": clip, "conversations": turns}])
    sample = load_llava_json(path, str(folder), "test").samples[0]
    assert sample.placeholders == ["<video>"]
    assert sample.questions == ["what?"]
    (video,) = sample.visual_inputs
    assert [np.asarray(frame).mean() / 6 for frame in video] == [2, 7, 12, 17, 22, 26, 31, 36]


def test_visual_inputs_have_the_order_of_their_placeholders(folder, clip):
    Image.new("RGB", (4, 4)).save(folder / "b.png")
    turns = [
        {"from": "human", "value": "<image>\n<video>\nwhat?"},
        {"from": "gpt", "value": "a cat"},
        {"from": "human", "value": "<image>\nand here?"},
        {"from": "gpt", "value": "none"},
    ]
    path = write_json(folder, [{"image": ["a.png", "b.png"], "video": [clip], "conversations": turns}])
    first, video, second = load_llava_json(path, str(folder), "test", frames=3).samples[0].visual_inputs
    assert (first.size, len(video), second.size) == ((8, 8), 3, (4, 4))


def test_load_llava_json_fingerprint_depends_on_frames_only_with_videos(folder, clip):
    for name, entry in (("clip", {"video": clip}), ("image", {"image": "a.png"})):
        path = write_json(folder, [entry | {"conversations": TURNS}])
        two, four = (load_llava_json(path, str(folder), "test", frames=n).fingerprint for n in (2, 4))
        assert (two == four) == (name == "image")
    with pytest.raises(ValueError, match=r"data\.frames: .*0"):
        load_llava_json(path, str(folder), "test", frames=0)


def test_load_llava_json_indexes_images_over_all_entries(shapes_split, tmp_path):
    turns = [("what colour is at row 1 column 2?", "red")]
    rows = []
    for entry, images in enumerate((1, 0, 2, 1)):
        names = [f"{entry}-{i}.png" for i in range(images)]
        for name in names:
            shapes_split.samples[0].image.save(tmp_path / name)
        rows.append({"image": names, "conversations": llava_conversation(turns, ["<image>"] * images)})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    split = load_llava_json(str(tmp_path / "rows.json"), str(tmp_path), "train")
    assert [[load.index for load in sample.loaders] for sample in split.samples] == [[0], [], [1, 2], [3]]
    assert split.image_count == 4


@pytest.mark.parametrize(
    ("answers", "split", "reason"),
    [
        ([""], "train", "all its answers are empty"),
        (["  ", "\n"], "test", "all its answers are empty"),
        (["yes", " "], "test", "turn 3: the answer is empty"),
    ],
)
def test_load_llava_json_of_empty_answers_raises(tmp_path, answers, split, reason):
    turns = [turn for answer in answers for turn in ({"from": "human", "value": "q"}, {"from": "gpt", "value": answer})]
    entries = [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": turns},
    ]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=rf"data\.json', entry 1: {reason}"):
        load_llava_json(str(tmp_path / "data.json"), str(tmp_path), split)


def test_load_llava_json_of_one_empty_answer_is_accepted_for_training(tmp_path):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "human", "value": "r"}]
    path = write_json(tmp_path, [{"conversations": [*turns, {"from": "gpt", "value": ""}]}])
    assert load_llava_json(path, str(tmp_path), "train").samples[0].answers == ["a", ""]


TEN = ["cat"] * 9 + ["a cat"]


def test_annotators_answers_are_read_for_each_question(folder):
    two = {"image": "a.png", "conversations": [*TURNS, {"from": "human", "value": "why?"}, TURNS[1]]}
    entries = [{"image": "a.png", "conversations": TURNS, "answers": TEN}, two | {"answers": [TEN, TEN[::-1]]}]
    split = load_llava_json(write_json(folder, entries), str(folder), "test", annotators=True)
    assert [single.annotators for single in single_questions(split.samples)] == [[TEN], [TEN], [TEN[::-1]]]
    unread = load_llava_json(write_json(folder, entries), str(folder), "test")
    assert [sample.annotators for sample in unread.samples] == [None, None]
    assert unread.fingerprint == split.fingerprint


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (TEN[:9], 'entry 0: "answers" must be 10 texts for each of its 1 questions, found .*cat'),
        ([*TEN[:9], 3], '"answers" must be 10 texts'),
        ([TEN, TEN], '"answers" must be 10 texts for each of its 1 questions'),
        ("cat", '"answers" .*found cat'),
    ],
)
def test_annotators_answers_of_another_form_name_their_entry(folder, answers, message):
    path = write_json(folder, [{"image": "a.png", "conversations": TURNS, "answers": answers}])
    with pytest.raises(ValueError, match=message):
        load_llava_json(path, str(folder), "test", annotators=True)
    load_llava_json(path, str(folder), "test")  # the key has no meaning for other scores


def test_annotators_answers_of_some_entries_alone_are_refused(folder):
    entry = {"image": "a.png", "conversations": TURNS}
    path = write_json(folder, [entry | {"answers": TEN}, entry])
    with pytest.raises(ValueError, match=r"1 of 2 entries .*entry 1"):
        load_llava_json(path, str(folder), "test", annotators=True)
