"""Questions about scenes of shapes."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from experiments.data.samples import IMAGE_PLACEHOLDER, OneQuestionPerImage, TextOnlyBaseline, single_questions
from experiments.data.shapes import (
    QUESTION_TYPES,
    comparison_questions,
    count_questions,
    existence_questions,
    load_shapes,
    place_questions,
    reading_questions,
    relation_questions,
)

# row 1: red ring, nothing, blue cross, nothing; row 2: blue cross, nothing, red square, green ring;
# row 3: nothing; row 4: nothing, nothing, nothing, red ring
CELLS = [
    *(("red", "ring"), None, ("blue", "cross"), None),
    *(("blue", "cross"), None, ("red", "square"), ("green", "ring")),
    *(None, None, None, None),
    *(None, None, None, ("red", "ring")),
]


def test_place_questions_ask_about_filled_grid_cells():
    pairs = dict(place_questions(CELLS))
    assert pairs["what colour is at row 2 column 4?"] == "green"
    assert pairs["what shape is at row 1 column 3?"] == "cross"
    assert not any("row 1 column 2" in question for question in pairs)


def test_existence_questions_cover_all_colours_and_shapes():
    pairs = dict(existence_questions(CELLS))
    assert len(pairs) == 20
    assert {q for q, a in pairs.items() if a == "yes"} == {
        f"is there a {thing}?" for thing in ("red ring", "blue cross", "red square", "green ring")
    }


def test_count_questions_count_colours_and_shapes():
    pairs = dict(count_questions(CELLS))
    assert pairs["how many red shapes are there?"] == "3"
    assert pairs["how many rings are there?"] == "3"
    assert pairs["how many triangles are there?"] == "0"


def test_comparison_questions_answer_no_to_a_tie():
    pairs = dict(comparison_questions(CELLS))
    assert pairs["are there more red shapes than blue shapes?"] == "yes"
    assert pairs["are there more crosses than rings?"] == "no"
    assert pairs["are there more yellow shapes than purple shapes?"] == "no"  # a tie is no more


def test_relation_questions_ask_for_the_nearest_object_and_about_unique_objects_alone():
    assert dict(relation_questions(CELLS)) == {
        "what colour is left of the red square?": "blue",
        "what shape is left of the red square?": "cross",
        "what colour is right of the red square?": "green",
        "what shape is right of the red square?": "ring",
        "what colour is above the red square?": "blue",
        "what shape is above the red square?": "cross",
        "what colour is left of the green ring?": "red",
        "what shape is left of the green ring?": "square",
        "what colour is below the green ring?": "red",
        "what shape is below the green ring?": "ring",
    }


def test_reading_questions_skip_empty_cells():
    # in reading order: red ring, blue cross, blue cross, red square, green ring, red ring
    assert dict(reading_questions(CELLS)) == {
        "in reading order, what colour comes two after the red square?": "red",
        "in reading order, what shape comes two after the red square?": "ring",
    }


def test_shape_samples_are_llava_conversations():
    sample = load_shapes("train", 1).samples[0]
    assert [turn["from"] for turn in sample.conversations] == ["human", "gpt"] * len(QUESTION_TYPES)
    assert sample.conversations[0]["value"].startswith(f"{IMAGE_PLACEHOLDER}\n")
    assert sum(turn["value"].count(IMAGE_PLACEHOLDER) for turn in sample.conversations) == 1
    assert sorted(sample.question_types) == sorted(QUESTION_TYPES)
    assert sample.image.size == (48, 48)


def test_load_shapes_is_deterministic_and_fingerprints_differ_by_seed():
    first, second, other = load_shapes("test", 20, 1), load_shapes("test", 20, 1), load_shapes("test", 20, 2)
    assert [s.conversations for s in first.samples] == [s.conversations for s in second.samples]
    assert first.samples[3].image.tobytes() == second.samples[3].image.tobytes()
    assert first.fingerprint == second.fingerprint != other.fingerprint


def test_single_questions_have_one_question_with_the_image_each():
    sample = load_shapes("test", 1, questions_per_type=dict.fromkeys(QUESTION_TYPES, 2)).samples[0]
    singles = list(single_questions([sample]))
    assert len(singles) == 12
    assert all(s.conversations[0]["value"].startswith(IMAGE_PLACEHOLDER) and len(s.conversations) == 2 for s in singles)
    assert [s.question_types[0] for s in singles] == sample.question_types


def test_text_only_baseline_of_shapes_is_near_chance():
    """The most frequent training answers do little better on new scenes than a uniform draw of an answer."""
    baseline = TextOnlyBaseline(load_shapes("train", 3000).samples)
    outcomes: dict[str, list[bool]] = defaultdict(list)
    answers: dict[str, Counter] = defaultdict(Counter)
    for sample in single_questions(load_shapes("test", 400).samples):
        question_type, (question,), (answer,) = sample.question_types[0], sample.questions, sample.answers
        outcomes[question_type].append(baseline(question, question_type) == answer)
        answers[question_type][answer] += 1
    chance = {
        "place": 2 / 9,
        "existence": 1 / 2,
        "count": 1 / 5,
        "relation": 2 / 9,
        "comparison": 1 / 2,
        "reading": 2 / 9,
    }
    for question_type, correct in outcomes.items():
        assert np.mean(correct) == pytest.approx(chance[question_type], abs=0.09), question_type
        assert len(answers[question_type]) == {"existence": 2, "comparison": 2, "count": 5}.get(question_type, 9)


def test_one_question_per_image_takes_the_question_types_in_turn():
    split = load_shapes("test", 12)
    singles = list(OneQuestionPerImage(split.samples))
    assert Counter(s.question_types[0] for s in singles) == dict.fromkeys(QUESTION_TYPES, 2)
    for single, whole in zip(singles, split.samples, strict=True):
        at = whole.questions.index(single.questions[0])
        assert (single.answers[0], single.question_types[0]) == (whole.answers[at], whole.question_types[at])
        assert single.image.tobytes() == whole.image.tobytes()
