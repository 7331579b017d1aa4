"""Samples and single questions."""

import weakref

from PIL import Image

from experiments.data.samples import Sample, llava_conversation, single_questions
from llava_mini.video import Video


def red_image() -> Image.Image:
    return Image.new("RGB", (2, 2), "red")


def test_visual_inputs_are_loaded_at_each_access_and_not_kept():
    calls = []
    sample = Sample("s", (lambda: calls.append(1) or red_image(),), llava_conversation([("what?", "red")]), ["x"])
    assert (sample.placeholders, sample.questions, sample.answers, calls) == (["<image>"], ["what?"], ["red"], [])
    loaded = weakref.ref(sample.image)
    assert loaded() is None
    assert sample.visual_inputs[0].getpixel((0, 0)) == (255, 0, 0)
    assert calls == [1, 1]


def test_image_of_a_sample_without_exactly_one_image_is_none():
    turns = llava_conversation([("what?", "red")], [])
    for load in ((), (red_image, red_image), (lambda: Video([red_image()]),)):
        assert Sample("s", load, turns, ["x"]).image is None


def test_single_questions_keep_the_places_of_images_and_leave_out_those_of_later_turns():
    loaders = tuple(lambda: red_image() for _ in range(4))  # four that differ
    turns = [
        *llava_conversation([("what?", "a")], ["<video>"]),
        {"from": "human", "value": "is <image> like <image>?"},
        {"from": "gpt", "value": "b"},
        *llava_conversation([("why?", "c"), ("and here?\n<image>", "d")], []),
    ]
    singles = list(single_questions([Sample("s", loaders, turns, ["x"] * 4)]))
    assert [single.conversations[0]["value"] for single in singles] == [
        "<video>\nwhat?",
        "<video>\nis <image> like <image>?",
        "<video>\n<image>\n<image>\nwhy?",
        "<video>\n<image>\n<image>\nand here?\n<image>",
    ]
    assert [single.loaders for single in singles] == [loaders[:1], loaders[:3], loaders[:3], loaders]
    assert [single.answers for single in singles] == [["a"], ["b"], ["c"], ["d"]]
