"""Clips of shapes and questions about them."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from experiments.data.samples import OneQuestionPerImage, TextOnlyBaseline
from experiments.data.scenes import CELL_SIZE, COLOURS, GRID_SIZE, IMAGE_SIZE
from experiments.data.shapes_video import (
    CLIP_SECONDS,
    clip_count_questions,
    clip_ends_questions,
    clip_existence_questions,
    clip_order_questions,
    load_shapes_video,
)

OBJECTS = [("red", "ring"), ("blue", "cross"), ("red", "ring"), ("green", "square"), ("blue", "ring")]


def test_clip_existence_questions_cover_all_colours_and_shapes():
    pairs = dict(clip_existence_questions(OBJECTS))
    assert len(pairs) == 20
    assert sorted(q for q, a in pairs.items() if a == "yes") == [
        f"is there ever a {name}?" for name in ("blue cross", "blue ring", "green square", "red ring")
    ]


def test_clip_ends_questions_ask_about_the_first_and_last_object():
    assert dict(clip_ends_questions(OBJECTS)) == {
        "what colour comes first?": "red",
        "what shape comes first?": "ring",
        "what colour comes last?": "blue",
        "what shape comes last?": "ring",
    }


def test_clip_order_questions_ask_only_about_what_follows_unique_objects():
    assert dict(clip_order_questions(OBJECTS)) == {
        "what colour comes right after the blue cross?": "red",
        "what shape comes right after the blue cross?": "ring",
        "what colour comes right after the green square?": "blue",
        "what shape comes right after the green square?": "ring",
    }


def test_clip_count_questions_count_colours():
    assert dict(clip_count_questions(OBJECTS)) == {
        "how many red shapes come?": "2",
        "how many green shapes come?": "1",
        "how many blue shapes come?": "2",
        "how many yellow shapes come?": "0",
        "how many purple shapes come?": "0",
    }


def shown_object(frame):
    """Return the main colour of a frame's pixels that are not grey, and the row and column of their grid cell."""
    pixels = np.asarray(frame).astype(int)
    painted = np.ptp(pixels, axis=2) > 60
    ys, xs = painted.nonzero()
    distance = [np.abs(pixels[painted] - paint).sum(1).mean() for paint in COLOURS.values()]
    return list(COLOURS)[int(np.argmin(distance))], (int(np.median(ys)) // CELL_SIZE, int(np.median(xs)) // CELL_SIZE)


def test_load_shapes_video_frames_agree_with_the_answers():
    clips = load_shapes_video("train", 40)
    for sample in clips.samples:
        frames = list(sample.visual_inputs[0])
        assert all(frame.size == (IMAGE_SIZE, IMAGE_SIZE) for frame in frames)
        assert len(frames) in CLIP_SECONDS
        colours = [shown_object(frame)[0] for frame in frames]
        for question, answer in zip(sample.questions, sample.answers, strict=True):
            if question in ("what colour comes first?", "what colour comes last?"):
                assert answer == colours[0 if "first" in question else -1]
            if question.startswith("how many"):
                assert answer == str(colours.count(question.split()[2]))


def test_load_shapes_video_shows_objects_in_all_grid_cells():
    cells = Counter(
        shown_object(frame)[1] for sample in load_shapes_video("train", 60).samples for frame in sample.visual_inputs[0]
    )
    assert len(cells) == GRID_SIZE**2


def test_load_shapes_video_with_frames_takes_them_evenly_and_keeps_the_questions():
    every, eight = (load_shapes_video("test", 30, frames=frames) for frames in (0, 8))
    for whole, reduced in zip(every.samples, eight.samples, strict=True):
        assert whole.conversations == reduced.conversations
        seconds = len(whole.visual_inputs[0])
        assert len(reduced.visual_inputs[0]) == min(8, seconds)
        shown = reduced.visual_inputs[0].indices
        assert all(0 < later - sooner <= -(-seconds // 8) for sooner, later in pairwise(shown))
    assert every.fingerprint != eight.fingerprint


def test_text_only_baseline_of_clips_is_far_from_perfect():
    train, test = (load_shapes_video(split, 2000) for split in ("train", "test"))
    baseline = TextOnlyBaseline(train.samples)
    correct = [baseline(s.questions[0], s.question_types[0]) == s.answers[0] for s in OneQuestionPerImage(test.samples)]
    assert 0.2 < np.mean(correct) < 0.45


def test_load_shapes_video_fingerprints_differ_by_split_and_seed_and_repeat():
    prints = [
        load_shapes_video(*which).fingerprint for which in (("train", 9), ("test", 9), ("train", 9, 1), ("train", 9))
    ]
    assert prints[0] == prints[3]
    assert len(set(prints)) == 3


@pytest.mark.parametrize(
    ("count", "frames", "message"), [(0, 0, r"data\.test_samples: .*0"), (1, -1, r"data\.frames: .*-1")]
)
def test_load_shapes_video_with_wrong_numbers_raises(count, frames, message):
    with pytest.raises(ValueError, match=message):
        load_shapes_video("test", count, frames=frames)
