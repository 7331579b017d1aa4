"""How many tokens a sample may have, and how a longer one is truncated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from experiments.data.samples import PLACEHOLDER, Sample


@dataclass(frozen=True)
class LengthLimit:
    """The longest sample that a model accepts, in tokens.

    Args:
        positions: Positions that the language model was made for; None if it has no such number.
        max_length: Longer samples are truncated to this many tokens; None refuses what exceeds `positions`.
    """

    positions: int | None = None
    max_length: int | None = None

    @classmethod
    def for_model(cls, config: PretrainedConfig, max_length: int | None = None) -> LengthLimit:
        """Return the limit of a model.

        Args:
            config: Config of the whole model.
            max_length: `data.max_length`.

        Raises:
            ValueError: If `max_length` is not positive, or exceeds the model's positions.

        Example:
            >>> LengthLimit.for_model(model.config).positions == model.config.text_config.max_position_embeddings
            True
        """
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        if max_length is not None and not 1 <= max_length <= (positions or max_length):
            raise ValueError(
                f"data.max_length: {max_length} tokens do not fit a model of {positions} positions; use 1 to {positions}, "
                "or none"
            )
        return cls(positions, max_length)

    def excess(self, length: int) -> int:
        """Return how many tokens a sample of `length` tokens has too many; 0 or less if it fits."""
        limits = [limit for limit in (self.positions, self.max_length) if limit is not None]
        return length - min(limits, default=length)


def droppable_questions(sample: Sample) -> int:
    """Return how many of the last questions, with their answers, a truncation may drop.

    Questions with images or videos stay, and so do the first question and the last answer that is not empty.
    """
    count = 0
    answers = sample.answers
    for question in reversed(sample.conversations[2::2]):
        rest = answers[: len(answers) - count - 1]
        if PLACEHOLDER.search(question["value"]) or not any(answer.strip() for answer in rest):
            break
        count += 1
    return count


def drop_questions(sample: Sample, count: int) -> Sample:
    """Return a sample without its last `count` questions and their answers."""
    if not count:
        return sample
    return replace(
        sample, conversations=sample.conversations[: -2 * count], question_types=sample.question_types[:-count]
    )


def cut_question(sample: Sample, excess: int, tokenizer: Any) -> Sample | None:
    """Return a sample without the end of its last question. The answer and all images and videos stay.

    Args:
        sample: The sample.
        excess: How many tokens to cut off.
        tokenizer: A fast tokenizer.

    Returns:
        The shorter sample, or None if the question has no more tokens than that.
    """
    turns = sample.conversations
    question = turns[-2]["value"]
    placeholders = list(PLACEHOLDER.finditer(question))
    if len(placeholders) == 1:  # the chat template gets a single image before the text, wherever it stands
        head, text = f"{placeholders[0][0]}\n", PLACEHOLDER.sub("", question).strip()
    else:
        head_end = placeholders[-1].end() if placeholders else 0
        head, text = question[:head_end], question[head_end:].rstrip()
    offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    if excess >= len(offsets):
        return None
    shorter = head + text[: offsets[len(offsets) - excess - 1][1]]
    return replace(sample, conversations=[*turns[:-2], {**turns[-2], "value": shorter}, turns[-1]])
