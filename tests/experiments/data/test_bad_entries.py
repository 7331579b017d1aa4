"""Entries that cannot be used among many: the run stops in one line, or leaves them out and lists them."""

import json
import random

import av
import numpy as np
import pytest
from PIL import Image

from experiments.data import media_files
from experiments.data.bad_entries import BadEntry, write_bad_entries
from experiments.data.llava_json import load_llava_json
from experiments.data.media_files import MediaFile, check_decodable, find_faults
from experiments.data.samples import Sample, Split

TURNS = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a cat"}]
# What is wrong with an entry, by its id. Each is an entry of its own in the file of the fixture.
BAD = {
    "no file": {"image": "none.png"},
    "no image": {"image": "text.png"},
    "empty file": {"image": "empty.png"},
    "truncated": {"image": "truncated.jpg"},
    "folder": {"image": "folder"},
    "address": {"image": "https://example.org/a.png"},
    "no list": {"image": "0.png", "conversations": "what?"},
    "no answer": {"image": "0.png", "conversations": TURNS[:1]},
    "two placeholders": {"image": "0.png", "conversations": [{"from": "human", "value": "<image><image>?"}, TURNS[1]]},
    "no video": {"video": "text.mp4"},
    "folder without frames": {"video": "folder"},
    "one of two": {
        "image": ["0.png", "truncated.jpg"],
        "conversations": [{"from": "human", "value": "<image><image>?"}, TURNS[1]],
    },
}
GOOD = 7


@pytest.fixture
def folder(tmp_path):
    """A folder with good and bad files, and `data.json` with all entries in an order that mixes them."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for i in range(GOOD):
        Image.fromarray(noise + np.uint8(i)).save(tmp_path / f"{i}.png")
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (tmp_path / "truncated.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder").mkdir()
    entries = [{"id": f"good-{i}", "image": f"{i}.png", "conversations": TURNS} for i in range(GOOD)]
    entries += [{"id": name, "conversations": TURNS} | entry for name, entry in BAD.items()]
    random.Random(0).shuffle(entries)
    (tmp_path / "data.json").write_text(json.dumps(entries))
    return tmp_path


def load(folder, **options):
    return load_llava_json(str(folder / "data.json"), str(folder), "train", **options)


def write_entries(folder, entries):
    (folder / "data.json").write_text(json.dumps(entries))


def test_load_llava_json_with_skip_leaves_out_every_bad_entry_and_no_other(folder):
    split = load(folder, bad="skip")
    entries = json.loads((folder / "data.json").read_text())
    assert [sample.id for sample in split.samples] == [e["id"] for e in entries if e["id"] not in BAD]
    assert [(bad.id, bad.entry) for bad in split.skipped] == [
        (entry["id"], number) for number, entry in enumerate(entries) if entry["id"] in BAD
    ]
    assert all(sample.visual_inputs for sample in split.samples)
    assert split.image_count == GOOD


def test_load_llava_json_with_skip_gives_path_and_reason_of_each(folder):
    reasons = {bad.id: (bad.path, bad.reason) for bad in load(folder, bad="skip").skipped}
    expected = {
        "no file": ("none.png", "no image"),
        "no image": ("text.png", "cannot be read as an image"),
        "empty file": ("empty.png", "0 bytes"),
        "truncated": ("truncated.jpg", "truncated"),
        "folder": ("folder", "is not a file"),
        "address": ("https://example.org/a.png", "is an address"),
        "no list": (None, "conversations"),
        "no answer": (None, "1 turns"),
        "two placeholders": (None, "found 2"),
        "no video": ("text.mp4", "cannot be read as a video"),
        "folder without frames": ("folder", "without image files"),
        "one of two": ("truncated.jpg", "truncated"),
    }
    assert reasons.keys() == expected.keys() == BAD.keys()
    for name, (path, reason) in expected.items():
        assert reasons[name][0] == path
        assert reason in reasons[name][1]
        assert "\n" not in reasons[name][1]


@pytest.mark.parametrize("name", [name for name in BAD if name not in ("no image", "truncated", "no video")])
def test_load_llava_json_with_stop_raises_one_line_with_number_id_path_and_reason(folder, name):
    entries = [{"id": name, "conversations": TURNS} | BAD[name]]
    write_entries(folder, [{"id": 0, "image": "0.png", "conversations": TURNS}, *entries])
    decoded_later = name in ("one of two", "folder without frames")
    with pytest.raises(ValueError, match=rf"data\.json', entry 1 \(id {name}\)") as error:
        check_decodable(load(folder))
    assert "\n" not in str(error.value)
    assert ("data.bad=skip" in str(error.value)) != decoded_later
    path = BAD[name].get("image", BAD[name].get("video"))
    if name not in ("no list", "no answer", "two placeholders"):
        assert (path[-1] if isinstance(path, list) else path) in str(error.value)


@pytest.mark.parametrize("name", ["no image", "truncated", "no video"])
def test_check_decodable_of_a_damaged_file_names_entry_path_and_reason(folder, name):
    """Files are decoded by this check alone: the generated image of a sample is not made."""
    write_entries(folder, [{"id": name, "conversations": TURNS} | BAD[name]])
    split = load(folder)
    path = BAD[name].get("image", BAD[name].get("video"))
    with pytest.raises(ValueError, match=rf"entry 0 \(id {name}\): .*{path}"):
        check_decodable(split)
    with pytest.raises(ValueError, match=rf"entry 0 \(id {name}\): .*{path}"):
        _ = split.samples[0].visual_inputs


def test_check_decodable_reads_no_generated_image():
    def fail():
        raise AssertionError("a generated image is made")

    check_decodable(Split("test", [Sample("s", (fail,), TURNS, ["x"])], "0" * 16))


def test_load_llava_json_fingerprint_depends_on_the_entries_left_out(folder):
    """A file that is damaged and keeps its number of bytes makes another data set."""
    write_entries(folder, [{"id": i, "image": f"{i}.png", "conversations": TURNS} for i in range(GOOD)])
    whole = load(folder, bad="skip")
    (folder / "2.png").write_bytes(bytes(len((folder / "2.png").read_bytes())))
    damaged = load(folder, bad="skip")
    assert [(bad.id, bad.path) for bad in damaged.skipped] == [("2", "2.png")]
    assert damaged.fingerprint != whole.fingerprint
    assert load(folder, bad="stop").fingerprint == whole.fingerprint  # no image was decoded


def test_load_llava_json_with_skip_and_nothing_bad_is_the_same_data_as_with_stop(folder):
    write_entries(folder, [{"id": i, "image": f"{i}.png", "conversations": TURNS} for i in range(GOOD)])
    skip, stop = load(folder, bad="skip"), load(folder)
    assert (skip.fingerprint, skip.skipped, stop.skipped) == (stop.fingerprint, (), None)


def test_load_llava_json_with_nothing_left_raises(folder):
    write_entries(folder, [{"id": name, "conversations": TURNS} | BAD[name] for name in ("no image", "truncated")])
    with pytest.raises(ValueError, match=r"^data\.bad: of 2 entries none.*entry 0 \(id no image\).*text\.png"):
        load(folder, bad="skip")


def test_load_llava_json_with_skip_decodes_again_only_after_a_file_changed(folder, monkeypatch):
    decoded = []
    fault = MediaFile.fault
    monkeypatch.setattr(media_files.MediaFile, "fault", lambda file: decoded.append(file.path.name) or fault(file))
    first = load(folder, bad="skip", cache=folder / "cache")
    distinct = {*(f"{i}.png" for i in range(GOOD)), "text.png", "truncated.jpg", "text.mp4", "folder"}
    assert sorted(decoded) == sorted(distinct)
    decoded.clear()
    again = load(folder, bad="skip", cache=folder / "cache")
    assert not decoded
    assert (again.skipped, again.fingerprint) == (first.skipped, first.fingerprint)
    Image.new("RGB", (9, 9)).save(folder / "text.png")
    changed = load(folder, bad="skip", cache=folder / "cache")
    assert sorted(decoded) == sorted(distinct)
    assert {bad.id for bad in changed.skipped} == BAD.keys() - {"no image"}
    assert changed.fingerprint != first.fingerprint


def test_find_faults_without_a_package_for_videos_raises(folder, monkeypatch):
    """A package that is not installed is no fault of the files."""
    from llava_mini import video

    monkeypatch.setattr(video, "is_av_available", lambda: False)
    with pytest.raises(ImportError, match="PyAV"):
        find_faults([MediaFile(folder / "text.mp4", "video", "entry 0")])


def test_find_faults_of_a_video_cut_off_accepts_what_can_be_decoded(tmp_path):
    """Videos are sampled from what a file still holds, as the model's own reader does; without a frame they are bad."""
    with av.open(str(tmp_path / "whole.mkv"), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
        for i in range(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 6 * i, np.uint8), "rgb24")))
        container.mux(stream.encode(None))
    content = (tmp_path / "whole.mkv").read_bytes()
    faults = {}
    for name, part in (("half", len(content) // 2), ("head", 300)):
        (tmp_path / f"{name}.mkv").write_bytes(content[:part])
        faults |= {name: find_faults([MediaFile(tmp_path / f"{name}.mkv", "video", "entry 0")])}
    assert not faults["half"]
    assert list(faults["head"]) == [tmp_path / "head.mkv"]


def test_write_bad_entries_writes_one_object_a_line(tmp_path):
    entries = [
        ("train", BadEntry("a.json", 3, "7", "b.png", "no image")),
        ("test", BadEntry("c.json", 0, None, None, "x")),
    ]
    written = write_bad_entries(entries, tmp_path, "0123456789abcdef")
    assert written == "skipped/0123456789abcdef.jsonl"
    assert [json.loads(line) for line in (tmp_path / written).read_text().splitlines()] == [
        {"split": "train", "file": "a.json", "entry": 3, "id": "7", "path": "b.png", "reason": "no image"},
        {"split": "test", "file": "c.json", "entry": 0, "id": None, "path": None, "reason": "x"},
    ]
