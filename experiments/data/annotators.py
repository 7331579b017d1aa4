"""The annotators' answers in an entry, for scores of generated answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.data.bad_entries import EntryError

ANNOTATORS = 10
"""Annotators of a question in VQAv2, VizWiz, TextVQA and OK-VQA."""


def annotators_answers(given: Any, questions: int) -> list[list[str]] | None:
    """Return the annotators' answers to each question of an entry.

    Args:
        given: The entry's "answers": ten texts if it has one question, else a list of ten texts for each; None if it has
            none.
        questions: Number of its questions.

    Returns:
        A list of ten answers for each question, or None.

    Raises:
        EntryError: If the entry has other answers than these.

    Example:
        >>> annotators_answers(["cat"] * 10, questions=1) == [["cat"] * 10]
        True
    """
    if given is None:
        return None
    lists = [given] if isinstance(given, list) and all(isinstance(answer, str) for answer in given) else given
    if not isinstance(lists, list) or len(lists) != questions or not all(map(_are_answers, lists)):
        raise EntryError(
            f'"answers" must be {ANNOTATORS} texts for each of its {questions} questions, found {str(given)[:80]}'
        )
    return lists


def check_all_or_none(entries: Sequence[dict[str, Any]]) -> None:
    """Check that all entries have annotators' answers, or none: a mean over both would mix two metrics.

    Args:
        entries: Checked entries, with "answers" and "where".

    Raises:
        ValueError: If some have them, with the first that has none.
    """
    without = [entry["where"] for entry in entries if entry["answers"] is None]
    if 0 < len(without) < len(entries):
        raise ValueError(
            f'data.score: {len(without)} of {len(entries)} entries have no "answers" of annotators, the first is '
            f"{without[0]}; give them to all entries or to none"
        )


def _are_answers(answers: Any) -> bool:
    return isinstance(answers, list) and len(answers) == ANNOTATORS and all(isinstance(a, str) for a in answers)
