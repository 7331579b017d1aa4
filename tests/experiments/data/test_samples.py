from PIL import Image

from experiments.data.samples import Sample, conversation, single_questions
from llava_mini.video import Video


def red() -> Image.Image:
    return Image.new("RGB", (2, 2), "red")


def test_pictures_are_loaded_once_and_when_asked_for():
    asked = []
    sample = Sample("s", (lambda: asked.append(1) or red(),), conversation([("what?", "red")]), ["x"])
    assert (sample.slots, sample.questions, sample.answers, asked) == (["<image>"], ["what?"], ["red"], [])
    assert sample.image is sample.pictures[0]
    assert asked == [1]


def test_image_is_none_but_for_one_image():
    turns = conversation([("what?", "red")], [])
    for load in ((), (red, red), (lambda: Video([red()]),)):
        assert Sample("s", load, turns, ["x"]).image is None


def test_a_single_question_sees_all_pictures():
    """Also those that a later turn of its conversation brought."""
    turns = [
        *conversation([("what?", "a")], ["<video>", "<image>"]),
        *conversation([("and here?", "b")], ["<image>"]),
    ]
    sample = Sample("s", (red,) * 3, turns, ["x", "y"])
    first, second = single_questions([sample])
    assert first.conversations[0]["value"] == "<video>\n<image>\n<image>\nwhat?"
    assert second.conversations[0]["value"] == "<video>\n<image>\n<image>\nand here?"
    assert first.load == second.load == sample.load
