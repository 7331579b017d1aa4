"""Words of a prompt and its answer, with the positions of their tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from probes.tokens.answer_positions import answer_positions
from probes.tokens.token_map import TokenMap

MOST_WORDS = 48
"""Words that are chosen by default. Each costs one row of attention for each layer and head."""

NEXT = "predicts the answer"
"""Text of the last position of a prompt, whose output is the first token of the answer."""

_CONTEXT = 4  # tokens decoded together with a token, since a token's text depends on those before it
_LONGEST_WORD = 20  # tokens; longer runs without a space, as in Chinese, are split into their tokens
_TEXT_GROUPS = ("system", "instruction", "response")


@dataclass(frozen=True)
class Word:
    """A word and its tokens.

    Attributes:
        text: The word.
        group: Token group of its first token.
        positions: Positions of its tokens in the prompt.
    """

    text: str
    group: str
    positions: tuple[int, ...]


@dataclass(frozen=True)
class TextPart:
    """A part of the text of a prompt, in reading order.

    Attributes:
        text: The text. For visual tokens, what they stand for.
        group: Its token group.
        word: Index of the chosen word that it is, or None.
    """

    text: str
    group: str
    word: int | None = None


@dataclass(frozen=True)
class Words:
    """The chosen words of one prompt, and the whole text that they stand in.

    Args:
        words: The words, in reading order.
        text: The whole text, without padding, in reading order.
    """

    words: tuple[Word, ...]
    text: tuple[TextPart, ...]

    @property
    def groups(self) -> tuple[str, ...]:
        """Return the name of each word's own token group."""
        return tuple(f"word {index}: {word.text.strip()}" for index, word in enumerate(self.words))

    def label(self, tokens: TokenMap) -> TokenMap:
        """Return a token map in which each word is a group of its own.

        Args:
            tokens: Map of the prompt.

        Raises:
            ValueError: If the map has several rows, or fewer positions than the words need.

        Example:
            >>> words = find_words(tokens, inputs["input_ids"], processor.tokenizer)
            >>> words.label(tokens).groups[5:7]
            ('word 0: how', 'word 1: many')
        """
        _require_one_row(tokens)
        length = tokens.labels.shape[1]
        masks = {}
        for group, word in zip(self.groups, self.words, strict=True):
            if max(word.positions) >= length:
                raise ValueError(f"words: {word.text!r} is at position {max(word.positions)}, the map has {length}")
            mask = torch.zeros_like(tokens.labels, dtype=torch.bool)
            mask[0, list(word.positions)] = True
            masks[group] = mask
        return tokens.relabel(masks)


def find_words(
    tokens: TokenMap,
    input_ids: Int[Tensor, "1 positions"],
    tokenizer: Any,
    words: Sequence[str] | None = None,
    question: str | None = None,
) -> Words:
    """Find the words of a prompt, for `record_attention(..., words=...)`.

    A word is text between spaces. Its attention is the mean over its tokens.

    Args:
        tokens: Map of one prompt, or of a prompt and its answer.
        input_ids: Its token ids.
        tokenizer: The tokenizer, which decodes them.
        words: The words to choose, as they stand in the text; each occurrence is chosen. By default the words of the
            question and the answer, and the last position before the answer, which predicts its first token.
            Special tokens are not chosen. Of more than `MOST_WORDS` words the last ones are chosen, and up to half of the
            places are kept for the question with that position.
        question: The text of the question, which limits the default to it. By default all of the instruction.

    Raises:
        ValueError: If the map has several rows, or a word or the question is not in the text.

    Example:
        >>> [word.text for word in find_words(tokens, inputs["input_ids"], processor.tokenizer).words]
        ['how', 'many', 'shapes', 'are', 'there']
    """
    _require_one_row(tokens)
    groups = [tokens.groups[label] for label in tokens.labels[0].tolist()]
    ids = input_ids[0].tolist()
    runs = _text_runs(groups, ids, tokenizer)
    candidates = [word for run in runs for word in run.words]
    if words is not None:
        candidates = _choose_by_text(candidates, words)
    else:
        span = None if question is None else _question_positions(runs, question)
        candidates = [
            word
            for word in candidates
            if word.group == "response"
            or (word.group == "instruction" and (span is None or span & set(word.positions)))
        ]
        candidates = _within_limit(_with_prediction(candidates, tokens))
    if not candidates:
        raise ValueError("words: the prompt has no word of an instruction or a response")
    return Words(tuple(candidates), _text_parts(groups, ids, tokenizer, runs, candidates))


@dataclass(frozen=True)
class _Run:
    """Text positions without visual tokens between them, their text, and the words in it."""

    positions: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]  # of each token, in the text
    text: str
    words: tuple[Word, ...]


def _require_one_row(tokens: TokenMap) -> None:
    if len(tokens.labels) != 1:
        raise ValueError(f"words: the token map has {len(tokens.labels)} rows; record one prompt at a time")


def _text_runs(groups: Sequence[str], ids: Sequence[int], tokenizer: Any) -> list[_Run]:
    """Split the text at visual tokens and padding, and find the words of each run."""
    runs, start = [], 0
    # Chat templates also mark turns with added tokens that are not special.
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    while start < len(groups):
        if groups[start] not in _TEXT_GROUPS:
            start += 1
            continue
        stop = start
        while stop < len(groups) and groups[stop] in _TEXT_GROUPS:
            stop += 1
        runs.append(_read_run(range(start, stop), groups, ids, tokenizer, special))
        start = stop
    return runs


def _read_run(positions: range, groups: Sequence[str], ids: Sequence[int], tokenizer: Any, special: set[int]) -> _Run:
    text, spans = "", []
    for position in positions:
        before = list(ids[max(positions.start, position - _CONTEXT) : position])
        context = _decode(tokenizer, before).rstrip("\ufffd")
        piece = _decode(tokenizer, [*before, ids[position]])
        # A character of several tokens is complete, and has text, at its last one.
        piece = piece[len(context) :].rstrip("\ufffd") if piece.startswith(context) else ""
        spans.append((len(text), len(text) + len(piece)))
        text += piece
    words = []
    spaced = text
    for position, (first, last) in zip(positions, spans, strict=True):
        if ids[position] in special:
            spaced = spaced[:first] + " " * (last - first) + spaced[last:]
    for found in re.finditer(r"\S+", spaced):
        members = [
            position
            for position, (first, last) in zip(positions, spans, strict=True)
            if (first < found.end() and last > found.start())
            or (first == last and found.start() <= first < found.end())
        ]
        members = [position for position in members if ids[position] not in special]
        if not members:
            continue
        parts = [members] if len(members) <= _LONGEST_WORD else [[position] for position in members]
        for part in parts:
            whole = len(parts) == 1
            first, last = spans[part[0] - positions.start][0], spans[part[-1] - positions.start][1]
            word = text[max(first, found.start()) : min(last, found.end())] if whole else text[first:last]
            if word.strip():
                words.append(Word(word, groups[part[0]], tuple(part)))
    return _Run(tuple(positions), tuple(spans), text, tuple(words))


def _decode(tokenizer: Any, ids: list[int]) -> str:
    if not ids:
        return ""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _choose_by_text(candidates: Sequence[Word], words: Sequence[str]) -> list[Word]:
    chosen = [word for word in candidates if word.text.strip() in {wanted.strip() for wanted in words}]
    missing = [wanted for wanted in words if wanted.strip() not in {word.text.strip() for word in chosen}]
    if missing:
        found = ", ".join(dict.fromkeys(repr(word.text.strip()) for word in candidates[-MOST_WORDS:]))
        raise ValueError(f"words: {missing[0]!r} is not in the text; choose from {found}")
    return chosen


def _question_positions(runs: Sequence[_Run], question: str) -> set[int]:
    """Return the positions of the last occurrence of the question."""
    for run in reversed(runs):
        start = run.text.rfind(question.strip())
        if start >= 0:
            stop = start + len(question.strip())
            return {
                position
                for position, (first, last) in zip(run.positions, run.spans, strict=True)
                if first < stop and last > start
            }
    raise ValueError(f"question: {question[:60]!r} is not in the text of the prompt")


def _with_prediction(words: list[Word], tokens: TokenMap) -> list[Word]:
    """Add the position that predicts the answer, unless it belongs to a word."""
    position = int(answer_positions(tokens)[0])
    if position < 0 or any(position in word.positions for word in words):
        return words
    group = tokens.groups[int(tokens.labels[0, position])]
    index = sum(word.positions[-1] < position for word in words)
    return [*words[:index], Word(NEXT, group, (position,)), *words[index:]]


def _within_limit(words: list[Word]) -> list[Word]:
    """Return at most `MOST_WORDS` words, the last ones of the answer and of the rest, which has up to half of the places."""
    answer = [word for word in words if word.group == "response"]
    asked = [word for word in words if word.group != "response"]
    asked = asked[-max(MOST_WORDS // 2, MOST_WORDS - len(answer)) :]
    kept = {*asked, *answer[len(answer) - min(len(answer), MOST_WORDS - len(asked)) :]}
    return [word for word in words if word in kept]


def _text_parts(
    groups: Sequence[str], ids: Sequence[int], tokenizer: Any, runs: Sequence[_Run], words: Sequence[Word]
) -> tuple[TextPart, ...]:
    """Return the whole text in reading order, with the chosen words marked."""
    word_of = {position: index for index, word in enumerate(words) for position in word.positions}
    text_of = {
        position: run.text[first:last]
        for run in runs
        for position, (first, last) in zip(run.positions, run.spans, strict=True)
    }
    parts: list[TextPart] = []
    for position, group in enumerate(groups):
        if group == "pad":
            continue
        word = word_of.get(position)
        text = "" if group == "vision" else text_of.get(position, "")
        if word is not None and words[word].text == NEXT:
            text = NEXT
        last = parts[-1] if parts else None
        if last is not None and (last.group, last.word) == (group, word):
            parts[-1] = TextPart(last.text + text, group, word)
        else:
            parts.append(TextPart(text, group, word))
    return tuple(parts)
