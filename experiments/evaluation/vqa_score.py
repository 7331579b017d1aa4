"""Scores of generated answers as public benchmarks define them: VQA accuracy, and GQA's exact match.

The rules are those of the VQA evaluation (https://visualqa.org/evaluation.html; Antol et al. 2015, Goyal et al. 2017) and
of lmms-eval's task `gqa`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from experiments.data.annotators import ANNOTATORS

_ENOUGH = 3
"""An answer that so many other annotators gave counts in full."""

_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBER_WORDS)}}
_ARTICLES = {"a", "an", "the"}
# The VQA evaluation adds a missing apostrophe to these words. Its table also turns "somebody'd" into "somebodyd", which
# contradicts its description and is left out. Words with a capital I are in its table, but answers are in lower case.
_CONTRACTED = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd
who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've
you'll you're you've
"""
_APOSTROPHE = {
    word[:i] + word[i + 1 :]: word
    for word in _CONTRACTED.split()
    for i, character in enumerate(word)
    if character == "'"
}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # the apostrophe and the colon stay, as in "girl's" and "2:50"
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # the period of a decimal stays


def normalise_answer(text: str) -> str:
    """Return an answer as the VQA evaluation compares it.

    Letters become lower case. Periods go, but not those of decimals. Number words up to ten become digits. Articles go.
    Contractions get a missing apostrophe. Other punctuation becomes a space. It goes without a space if it also occurs
    beside a space, or if the answer has a comma inside a number.

    Args:
        text: The answer.

    Example:
        >>> [normalise_answer(text) for text in ("Two.", "a T-shirt", "1,000", "3.5", "dont know")]
        ['2', 't shirt', '1000', '3.5', "don't know"]
    """
    text = " ".join(text.split())
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    changes: dict[str, str | int | None] = {
        mark: "" if has_number or f"{mark} " in text or f" {mark}" in text else " " for mark in _PUNCTUATION
    }
    words = _PERIOD.sub("", text.translate(str.maketrans(changes))).lower().split()
    digits = (_DIGITS.get(word, word) for word in words)
    return " ".join(_APOSTROPHE.get(word, word) for word in digits if word not in _ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Return the VQA accuracy of an answer.

    With ten annotators it is the mean, over the ten sets of nine, of min(1, matches / 3). Up to four matches in all it is
    0, 0.3, 0.6, 0.9 and 1. With one reference it is the exact match.

    Args:
        answer: The generated answer.
        references: The annotators' answers, ten or one.

    Raises:
        ValueError: If the number of references is another.

    Example:
        >>> vqa_accuracy("two", ["2"] * 3 + ["3"] * 7)
        0.9
    """
    given = normalise_answer(answer)
    matches = [normalise_answer(reference) for reference in references].count(given)
    if len(references) == 1:
        return float(matches)
    if len(references) != ANNOTATORS:
        raise ValueError(f"references: must be {ANNOTATORS} annotators' answers or one, found {len(references)}")
    # A set without one of the matching annotators has a match less. Whole numbers keep the result a tenth.
    thirds = matches * min(_ENOUGH, matches - 1) + (ANNOTATORS - matches) * min(_ENOUGH, matches)
    return thirds / (_ENOUGH * ANNOTATORS)


def gqa_match(answer: str, references: Sequence[str]) -> float:
    """Return 1 if an answer is the reference without regard to case and punctuation, else 0 (lmms-eval's task `gqa`).

    Args:
        answer: The generated answer.
        references: The right answer alone.

    Example:
        >>> gqa_match("Yes.", ["yes"]), gqa_match("a cat", ["cat"])
        (1.0, 0.0)
    """
    (reference,) = references
    without = str.maketrans("", "", string.punctuation)
    return float(answer.strip().lower().translate(without) == reference.strip().lower().translate(without))
