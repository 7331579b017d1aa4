"""Questions about the cells of a grid, balanced so that a text-only model gains little from the question text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

QuestionAnswer = tuple[str, str]
TypedQuestion = tuple[str, str, str]  # question type, question, answer
NEIGHBOUR_OFFSETS = {
    "left of": (0, -1),
    "right of": (0, 1),
    "above": (-1, 0),
    "below": (1, 0),
}  # rows down, columns right


def grid_cell_name(cell: int, grid_size: int) -> str:
    """Return the words for a grid cell, such as "row 2 column 3".

    Args:
        cell: Index of the grid cell in reading order, from 0.
        grid_size: Cells per side of the grid.
    """
    return f"row {cell // grid_size + 1} column {cell % grid_size + 1}"


def neighbours(cell: int, grid_size: int, filled: Sequence[bool]) -> Iterator[tuple[str, int]]:
    """Yield the nearest filled grid cell in each direction, within the row or column of a grid cell.

    Args:
        cell: Index of the grid cell in reading order, from 0.
        grid_size: Cells per side of the grid.
        filled: Whether each grid cell holds something, in reading order.

    Yields:
        The direction of the neighbour (a key of `NEIGHBOUR_OFFSETS`) and its index.

    Example:
        >>> dict(neighbours(0, 2, [True, False, True, True]))
        {'below': 2}
    """
    for direction, (down, right) in NEIGHBOUR_OFFSETS.items():
        row, column = cell // grid_size + down, cell % grid_size + right
        while 0 <= row < grid_size and 0 <= column < grid_size:
            if filled[row * grid_size + column]:
                yield direction, row * grid_size + column
                break
            row, column = row + down, column + right


def draw_questions(
    candidates: Mapping[str, Sequence[QuestionAnswer]], questions_per_type: Mapping[str, int], rng: np.random.Generator
) -> list[TypedQuestion]:
    """Draw questions of each type with balanced answers.

    The answer is drawn first, uniformly from those that the image allows. Then a question with this answer is drawn. So
    all answers to a question are about equally likely for a model that gets no image.

    Args:
        candidates: All questions of each type that the image allows. A type without candidates is left out.
        questions_per_type: How many questions of each type to draw.
        rng: The source of all draws.

    Returns:
        (question type, question, answer) of all drawn questions, in random order.
    """
    drawn: list[TypedQuestion] = []
    for question_type, pairs in candidates.items():
        questions_by_answer: dict[str, list[str]] = {}
        for question, answer in pairs:
            questions_by_answer.setdefault(answer, []).append(question)
        answers = list(questions_by_answer)
        for _ in range(questions_per_type[question_type] if answers else 0):
            answer = answers[rng.integers(len(answers))]
            questions = questions_by_answer[answer]
            drawn.append((question_type, questions[rng.integers(len(questions))], answer))
    return [drawn[i] for i in rng.permutation(len(drawn))]
