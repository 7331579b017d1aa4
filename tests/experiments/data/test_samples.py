"""Samples and single questions."""

from PIL import Image

from experiments.data.samples import Sample, llava_conversation, single_questions
from llava_mini.video import Video


def red_image() -> Image.Image:
    return Image.new("RGB", (2, 2), "red")


def test_visual_inputs_are_loaded_once_at_first_access():
    calls = []
    sample = Sample("s", (lambda: calls.append(1) or red_image(),), llava_conversation([("what?", "red")]), ["x"])
    assert (sample.placeholders, sample.questions, sample.answers, calls) == (["<image>"], ["what?"], ["red"], [])
    assert sample.image is sample.visual_inputs[0]
    assert calls == [1]


def test_image_of_a_sample_without_exactly_one_image_is_none():
    turns = llava_conversation([("what?", "red")], [])
    for load in ((), (red_image, red_image), (lambda: Video([red_image()]),)):
        assert Sample("s", load, turns, ["x"]).image is None


def test_single_questions_have_all_visual_inputs_of_the_conversation():
    """Those of later turns too."""
    turns = [
        *llava_conversation([("what?", "a")], ["<video>", "<image>"]),
        *llava_conversation([("and here?", "b")], ["<image>"]),
    ]
    sample = Sample("s", (red_image,) * 3, turns, ["x", "y"])
    first, second = single_questions([sample])
    assert first.conversations[0]["value"] == "<video>\n<image>\n<image>\nwhat?"
    assert second.conversations[0]["value"] == "<video>\n<image>\n<image>\nand here?"
    assert first.loaders == second.loaders == sample.loaders
