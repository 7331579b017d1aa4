from collections import Counter, defaultdict

import numpy as np
import pytest

from experiments.data.samples import IMAGE_SLOT, OneQuestionEach, TextGuess, single_questions
from experiments.data.shapes import KINDS, comparison, count, existence, load_shapes, place, reading, relation

# row 1: red ring, blue cross, nothing; row 2: blue cross, red square, green ring; row 3: nothing, nothing, red ring
CELLS = [
    ("red", "ring"),
    ("blue", "cross"),
    None,
    ("blue", "cross"),
    ("red", "square"),
    ("green", "ring"),
    None,
    None,
    ("red", "ring"),
]


def test_place():
    pairs = dict(place(CELLS))
    assert pairs["what colour is at row 2 column 3?"] == "green"
    assert pairs["what shape is at row 1 column 2?"] == "cross"
    assert not any("row 1 column 3" in question for question in pairs)


def test_existence():
    pairs = dict(existence(CELLS))
    assert len(pairs) == 20
    assert {q for q, a in pairs.items() if a == "yes"} == {
        f"is there a {thing}?" for thing in ("red ring", "blue cross", "red square", "green ring")
    }


def test_count():
    pairs = dict(count(CELLS))
    assert pairs["how many red shapes are there?"] == "3"
    assert pairs["how many rings are there?"] == "3"
    assert pairs["how many triangles are there?"] == "0"


def test_comparison():
    pairs = dict(comparison(CELLS))
    assert pairs["are there more red shapes than blue shapes?"] == "yes"
    assert pairs["are there more crosses than rings?"] == "no"
    assert pairs["are there more yellow shapes than purple shapes?"] == "no"  # a tie is no more


def test_relation_asks_only_beside_things_that_are_there_once():
    assert dict(relation(CELLS)) == {
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


def test_reading_order_passes_over_empty_cells():
    # in reading order: red ring, blue cross, blue cross, red square, green ring, red ring
    assert dict(reading(CELLS)) == {
        "in reading order, what colour comes two after the red square?": "red",
        "in reading order, what shape comes two after the red square?": "ring",
    }


def test_samples_are_llava_conversations():
    sample = load_shapes("train", 1).samples[0]
    assert [turn["from"] for turn in sample.conversations] == ["human", "gpt"] * len(KINDS)
    assert sample.conversations[0]["value"].startswith(f"{IMAGE_SLOT}\n")
    assert sum(turn["value"].count(IMAGE_SLOT) for turn in sample.conversations) == 1
    assert sorted(sample.kinds) == sorted(KINDS)
    assert sample.image.size == (48, 48)


def test_deterministic_and_fingerprinted():
    first, second, other = load_shapes("test", 20, 1), load_shapes("test", 20, 1), load_shapes("test", 20, 2)
    assert [s.conversations for s in first.samples] == [s.conversations for s in second.samples]
    assert first.samples[3].image.tobytes() == second.samples[3].image.tobytes()
    assert first.fingerprint == second.fingerprint != other.fingerprint


def test_single_questions_stand_alone():
    sample = load_shapes("test", 1, rounds=dict.fromkeys(KINDS, 2)).samples[0]
    singles = list(single_questions([sample]))
    assert len(singles) == 12
    assert all(s.conversations[0]["value"].startswith(IMAGE_SLOT) and len(s.conversations) == 2 for s in singles)
    assert [s.kinds[0] for s in singles] == sample.kinds


def test_text_alone_says_little():
    """A table of the commonest training answers does little better on new scenes than a die with the answers' sides."""
    guess = TextGuess(load_shapes("train", 3000).samples)
    right: dict[str, list[bool]] = defaultdict(list)
    answers: dict[str, Counter] = defaultdict(Counter)
    for sample in single_questions(load_shapes("test", 400).samples):
        kind, (question,), (answer,) = sample.kinds[0], sample.questions, sample.answers
        right[kind].append(guess(question, kind) == answer)
        answers[kind][answer] += 1
    chance = {
        "place": 2 / 9,
        "existence": 1 / 2,
        "count": 1 / 5,
        "relation": 2 / 9,
        "comparison": 1 / 2,
        "reading": 2 / 9,
    }
    for kind, outcomes in right.items():
        assert np.mean(outcomes) == pytest.approx(chance[kind], abs=0.09), kind
        assert len(answers[kind]) == {"existence": 2, "comparison": 2, "count": 5}.get(kind, 9)


def test_one_question_each_takes_the_kinds_in_turn():
    split = load_shapes("test", 12)
    singles = list(OneQuestionEach(split.samples))
    assert Counter(s.kinds[0] for s in singles) == dict.fromkeys(KINDS, 2)
    for single, whole in zip(singles, split.samples, strict=True):
        at = whole.questions.index(single.questions[0])
        assert (single.answers[0], single.kinds[0]) == (whole.answers[at], whole.kinds[at])
        assert single.image.tobytes() == whole.image.tobytes()
