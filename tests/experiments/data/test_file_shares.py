"""Several conversation files as one training split, each with a share."""

import json
from collections import Counter

import pytest

from experiments.data.file_shares import draw_entries
from experiments.data.llava_json import load_llava_json


@pytest.mark.parametrize(
    ("size", "share", "least", "most", "total"),
    [
        (10, 1.0, 1, 1, 10),
        (10, 2.0, 2, 2, 20),
        (10, 0.5, 0, 1, 5),
        (10, 2.5, 2, 3, 25),
        (7, 0.5, 0, 1, 4),
        (3, 0.1, 0, 1, 0),
    ],
)
def test_draw_entries_takes_each_as_often_as_the_share_says(size, share, least, most, total):
    counts = Counter(draw_entries([size], [share], seed=0))
    assert sum(counts.values()) == total
    assert all(least <= counts[0, entry] <= most for entry in range(size))


def test_draw_entries_depends_on_seed_and_file():
    def drawn(seed, file):
        return {entry for number, entry in draw_entries([1000] * 2, [0.5] * 2, seed) if number == file}

    assert drawn(0, 0) == drawn(0, 0)
    for other in (drawn(1, 0), drawn(0, 1)):
        assert 200 < len(drawn(0, 0) & other) < 300  # 250 are expected of two draws of 500 from 1000


def test_draw_entries_mixes_files_evenly_and_keeps_the_order_of_one():
    assert draw_entries([4], [1.0], seed=3) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    first = draw_entries([900, 300], [1.0, 1.0], seed=0)[:400]
    assert 270 < sum(file == 0 for file, _ in first) < 330  # 300 are expected


@pytest.fixture
def files(tmp_path):
    """Two files of 6 and 4 text conversations."""
    for name, size in (("a", 6), ("b", 4)):
        entries = [
            {"id": f"{name}{i}", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
            for i in range(size)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    return [str(tmp_path / "a.json"), str(tmp_path / "b.json")]


def test_load_llava_json_of_several_files_takes_their_shares(files, tmp_path):
    split = load_llava_json(files, str(tmp_path), "train", shares=[0.5, 2.0])
    counts = Counter(sample.id for sample in split.samples)
    assert len(split) == 3 + 8
    assert {name: counts[name] for name in counts if name[0] == "b"} == {f"b{i}": 2 for i in range(4)}
    assert len(load_llava_json(files, str(tmp_path), "train", 5, shares=[0.5, 2.0])) == 5


def test_load_llava_json_of_several_files_has_a_fingerprint_for_each_mixture(files, tmp_path):
    mixtures = [((), 0), ([1.0, 2.0], 0), ([1.0, 2.0], 1), ([2.0, 1.0], 0)]
    prints = [load_llava_json(files, str(tmp_path), "train", shares=s, seed=seed).fingerprint for s, seed in mixtures]
    prints += [load_llava_json(file, str(tmp_path), "train").fingerprint for file in files]
    assert len(set(prints)) == 6
    assert load_llava_json(files, str(tmp_path), "train", shares=[1.0, 2.0]).fingerprint == prints[1]
    assert load_llava_json(files[:1], str(tmp_path), "train").fingerprint == prints[4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": [1.0, 1.0, 1.0]}, r"data\.shares: .* 2 files, found 3"),
        ({"shares": [0.01, 0.01]}, r"data\.shares: \[0\.01, 0\.01\]"),
    ],
)
def test_load_llava_json_of_shares_that_do_not_fit_raises(files, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        load_llava_json(files, str(tmp_path), "train", **options)
    with pytest.raises(ValueError, match=r"data\.images: .* 2 files, found 3"):
        load_llava_json(files, [str(tmp_path)] * 3, "train")


def test_load_llava_json_reads_the_images_of_each_file_in_its_own_folder(files, tmp_path):
    from PIL import Image

    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    for side, file in enumerate(files, 1):
        (tmp_path / str(side)).mkdir()
        Image.new("RGB", (side, side)).save(tmp_path / str(side) / "x.png")
        with open(file, "w") as stream:
            json.dump([{"id": f"{side}", "image": "x.png", "conversations": turns}], stream)
    split = load_llava_json(files, [str(tmp_path / "1"), str(tmp_path / "2")], "train", shares=[1.0, 2.0])
    assert sorted(sample.id for sample in split.samples) == ["1", "2", "2"]
    assert all(sample.image.width == int(sample.id) for sample in split.samples)
    assert {load.index for sample in split.samples for load in sample.loaders} == {0, 1}
    assert split.image_count == 2
