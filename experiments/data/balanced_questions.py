"""Questions about things on a grid, drawn so that the text alone says little."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

Pair = tuple[str, str]  # question, answer
NEIGHBOURS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


def cell_name(cell: int, grid: int) -> str:
    return f"row {cell // grid + 1} column {cell % grid + 1}"


def beside(cell: int, grid: int) -> Iterator[tuple[str, int]]:
    """The cells around a cell of a grid in reading order, each with what to call where it lies."""
    for word, (down, right) in NEIGHBOURS.items():
        row, column = cell // grid + down, cell % grid + right
        if 0 <= row < grid and 0 <= column < grid:
            yield word, row * grid + column


def ask(
    candidates: Mapping[str, Sequence[Pair]], rounds: Mapping[str, int], rng: np.random.Generator
) -> list[tuple[str, str, str]]:
    """`rounds[kind]` questions of each kind in random order, as (kind, question, answer).

    The answer is drawn first, evenly from those the picture allows, then a question that has it: a model that sees no
    picture finds all answers to a question about equally likely. A kind with no candidate is left out.
    """
    asked: list[tuple[str, str, str]] = []
    for kind, pairs in candidates.items():
        by_answer: dict[str, list[str]] = {}
        for question, answer in pairs:
            by_answer.setdefault(answer, []).append(question)
        answers = list(by_answer)
        for _ in range(rounds[kind] if answers else 0):
            answer = answers[rng.integers(len(answers))]
            asked.append((kind, by_answer[answer][rng.integers(len(by_answer[answer]))], answer))
    return [asked[i] for i in rng.permutation(len(asked))]
