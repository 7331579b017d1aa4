from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from experiments.data.samples import OneQuestionEach, TextGuess
from experiments.data.scenes import CELL, COLOURS, SIDE
from experiments.data.shapes_video import SECONDS, count, ends, existence, load_shapes_video, order

THINGS = [("red", "ring"), ("blue", "cross"), ("red", "ring"), ("green", "square"), ("blue", "ring")]


def test_existence():
    pairs = dict(existence(THINGS))
    assert len(pairs) == 20
    assert sorted(q for q, a in pairs.items() if a == "yes") == [
        f"is there ever a {thing}?" for thing in ("blue cross", "blue ring", "green square", "red ring")
    ]


def test_ends():
    assert dict(ends(THINGS)) == {
        "what colour comes first?": "red",
        "what shape comes first?": "ring",
        "what colour comes last?": "blue",
        "what shape comes last?": "ring",
    }


def test_order_asks_only_after_things_that_come_once():
    assert dict(order(THINGS)) == {
        "what colour comes right after the blue cross?": "red",
        "what shape comes right after the blue cross?": "ring",
        "what colour comes right after the green square?": "blue",
        "what shape comes right after the green square?": "ring",
    }


def test_count():
    assert dict(count(THINGS)) == {
        "how many red shapes come?": "2",
        "how many green shapes come?": "1",
        "how many blue shapes come?": "2",
        "how many yellow shapes come?": "0",
        "how many purple shapes come?": "0",
    }


def seen(frame):
    """The colour that most of what is not grey in a frame has, and the cell it lies in."""
    pixels = np.asarray(frame).astype(int)
    painted = np.ptp(pixels, axis=2) > 60
    ys, xs = painted.nonzero()
    distance = [np.abs(pixels[painted] - paint).sum(1).mean() for paint in COLOURS.values()]
    return list(COLOURS)[int(np.argmin(distance))], (int(np.median(ys)) // CELL, int(np.median(xs)) // CELL)


def test_the_frames_show_what_the_answers_say():
    clips = load_shapes_video("train", 40)
    for sample in clips.samples:
        frames = list(sample.pictures[0])
        assert all(frame.size == (SIDE, SIDE) for frame in frames)
        assert len(frames) in SECONDS
        colours = [seen(frame)[0] for frame in frames]
        for question, answer in zip(sample.questions, sample.answers, strict=True):
            if question in ("what colour comes first?", "what colour comes last?"):
                assert answer == colours[0 if "first" in question else -1]
            if question.startswith("how many"):
                assert answer == str(colours.count(question.split()[2]))


def test_one_thing_a_second_anywhere_in_the_picture():
    cells = Counter(seen(frame)[1] for sample in load_shapes_video("train", 60).samples for frame in sample.pictures[0])
    assert len(cells) == 9


def test_frames_are_spread_evenly_and_the_questions_stay():
    every, eight = (load_shapes_video("test", 30, frames=frames) for frames in (0, 8))
    for whole, some in zip(every.samples, eight.samples, strict=True):
        assert whole.conversations == some.conversations
        seconds = len(whole.pictures[0])
        assert len(some.pictures[0]) == min(8, seconds)
        shown = some.pictures[0].indices
        assert all(0 < later - sooner <= -(-seconds // 8) for sooner, later in pairwise(shown))
    assert every.fingerprint != eight.fingerprint


def test_the_text_says_little():
    train, test = (load_shapes_video(split, 2000) for split in ("train", "test"))
    guess = TextGuess(train.samples)
    right = [guess(s.questions[0], s.kinds[0]) == s.answers[0] for s in OneQuestionEach(test.samples)]
    assert 0.2 < np.mean(right) < 0.45


def test_splits_and_seeds_differ_and_repeat():
    prints = [
        load_shapes_video(*which).fingerprint for which in (("train", 9), ("test", 9), ("train", 9, 1), ("train", 9))
    ]
    assert prints[0] == prints[3]
    assert len(set(prints)) == 3


@pytest.mark.parametrize(("count", "frames", "said"), [(0, 0, "data.test: 0 pictures"), (1, -1, "data.frames: -1")])
def test_what_cannot_be_made(count, frames, said):
    with pytest.raises(ValueError, match=said):
        load_shapes_video("test", count, frames=frames)
