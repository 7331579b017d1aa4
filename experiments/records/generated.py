"""The part of a record on generated answers and their scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from experiments.records.part import Part

_NAMES = {("vqa", 10): "VQA accuracy", ("vqa", 1): "Normalised exact match", ("gqa", 1): "GQA exact match"}
"""Names of the metrics of generated answers, by `data.score` and number of references."""


class ScoredAnswers(Part):
    """Generated answers with one kind of input."""

    answers: list[str] = Field(description="answer to each question, by greedy decoding")
    scores: list[float] = Field(description="score of each answer: 0, 0.3, 0.6, 0.9 or 1; 0 or 1 with one reference")


class GeneratedPart(Part):
    """Generated answers, scored by the metric of a benchmark."""

    metric: Literal["vqa", "gqa"] = Field(description="VQA accuracy, or exact match without case and punctuation")
    references: Literal[1, 10] = Field(description="right answers of a question: one, or those of ten annotators")
    max_new_tokens: int = Field(description="tokens of an answer, at most")
    image: ScoredAnswers = Field(description="with the question's image")
    blank: ScoredAnswers | None = Field(None, description="with a grey image")
    shuffled: ScoredAnswers | None = Field(None, description="with another question's image")


def score_name(part: Mapping[str, Any]) -> str:
    """Return the name of the metric of generated answers.

    Args:
        part: The `generated` part of a record.

    Example:
        >>> score_name({"metric": "vqa", "references": 10})
        'VQA accuracy (generated)'
    """
    return f"{_NAMES[part['metric'], part['references']]} (generated)"


def check_generated(part: GeneratedPart, examples: int) -> None:
    """Check that every question has an answer and a score that the metric can give.

    Args:
        part: The part.
        examples: Number of questions.

    Raises:
        ValueError: If not, in one line that begins with the field.
    """
    possible = (0, 0.3, 0.6, 0.9, 1) if part.references > 1 else (0, 1)
    for view in ("image", "blank", "shuffled"):
        scored = getattr(part, view)
        if scored is None:
            continue
        for name in ("answers", "scores"):
            if (count := len(getattr(scored, name))) != examples:
                raise ValueError(f"generated.{view}.{name}: has {count} entries for {examples} examples")
        for index, score in enumerate(scored.scores):
            if score not in possible:
                raise ValueError(f"generated.{view}.scores[{index}]: must be one of {possible}, found {score}")
