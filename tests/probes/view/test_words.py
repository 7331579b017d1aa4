"""Words of a prompt: their text and the positions of their tokens."""

import pytest
import torch

from probes import TokenMap
from probes.view.words import MOST_WORDS, NEXT, find_words
from tests.probes.tokens.families.tiny_family import tokenizer

TOKENIZER = tokenizer()  # one token per byte
SYSTEM, VISION, INSTRUCTION, RESPONSE, PAD = (
    TokenMap(torch.zeros(1, 1, dtype=torch.long)).index(group)
    for group in ("system", "vision", "instruction", "response", "pad")
)


def prompt(*parts):
    """Return token ids and a map from (group, text or number of tokens) parts."""
    ids, labels = [], []
    for group, content in parts:
        tokens = (
            [0] * content if isinstance(content, int) else TOKENIZER(content, add_special_tokens=False)["input_ids"]
        )
        ids += tokens
        labels += [group] * len(tokens)
    return torch.tensor([ids]), TokenMap(torch.tensor([labels]))


def texts(words):
    return [word.text for word in words.words]


def test_find_words_of_question_and_answer_have_the_positions_of_their_bytes():
    ids, tokens = prompt((SYSTEM, "hi "), (VISION, 4), (INSTRUCTION, "is it red?"), (RESPONSE, " yes"))
    words = find_words(tokens, ids, TOKENIZER)
    assert texts(words) == ["is", "it", "red?", "yes"]
    assert [word.positions for word in words.words] == [(7, 8), (10, 11), (13, 14, 15, 16), (18, 19, 20)]
    assert [word.group for word in words.words] == ["instruction"] * 3 + ["response"]


def test_find_words_adds_the_position_that_predicts_the_answer_if_no_word_has_it():
    ids, tokens = prompt((VISION, 4), (INSTRUCTION, "is it? "), (RESPONSE, "yes"))
    words = find_words(tokens, ids, TOKENIZER)
    assert texts(words) == ["is", "it?", NEXT, "yes"]
    assert words.words[2].positions == (10,)


def test_find_words_of_several_bytes_a_character_are_whole():
    ids, tokens = prompt((VISION, 2), (INSTRUCTION, "größe 色?"))
    words = find_words(tokens, ids, TOKENIZER)
    assert texts(words) == ["größe", "色?"]
    assert words.words[0].positions == tuple(range(2, 9))  # ö and ß have two bytes
    assert words.words[1].positions == tuple(range(10, 14))  # 色 has three


def test_find_words_special_tokens_end_a_word_and_are_none():
    special = tokenizer(["<turn>"])
    ids = special("red?<turn>a<eos>", add_special_tokens=False)["input_ids"]
    tokens = TokenMap(torch.tensor([[VISION] + [INSTRUCTION] * (len(ids) - 2) + [RESPONSE]]))
    assert len(ids) == 7
    words = find_words(tokens, torch.tensor([[0, *ids[:-1]]]), special, words=["red?"])
    assert words.words[0].positions == (1, 2, 3, 4)


def test_find_words_limited_to_the_last_occurrence_of_the_question():
    ids, tokens = prompt((VISION, 2), (INSTRUCTION, "Q: is it? A: is it? A:"))
    words = find_words(tokens, ids, TOKENIZER, question="is it?")
    assert [word.positions[0] for word in words.words[:2]] == [15, 18]


def test_find_words_by_name_chooses_every_occurrence():
    ids, tokens = prompt((VISION, 2), (INSTRUCTION, "red or red"))
    words = find_words(tokens, ids, TOKENIZER, words=["red"])
    assert [word.positions[0] for word in words.words] == [2, 9]


def test_find_words_more_than_the_limit_keeps_the_last_ones():
    ids, tokens = prompt((VISION, 2), (INSTRUCTION, " ".join(map(str, range(MOST_WORDS + 30)))))
    words = find_words(tokens, ids, TOKENIZER)
    assert len(words.words) == MOST_WORDS
    assert texts(words)[-1] == str(MOST_WORDS + 29)


def test_find_words_of_a_long_answer_keeps_places_for_the_question_and_the_position_before_the_answer():
    asked, answer = [f"q{number}" for number in range(5)], [f"a{number}" for number in range(100)]
    ids, tokens = prompt((VISION, 2), (INSTRUCTION, " ".join(asked) + " "), (RESPONSE, " ".join(answer)))
    assert texts(find_words(tokens, ids, TOKENIZER)) == [*asked, NEXT, *answer[-(MOST_WORDS - 6) :]]
    asked *= 20
    ids, tokens = prompt((VISION, 2), (INSTRUCTION, " ".join(asked) + " "), (RESPONSE, " ".join(answer)))
    half = MOST_WORDS // 2
    assert texts(find_words(tokens, ids, TOKENIZER)) == [*asked[-half + 1 :], NEXT, *answer[-half:]]
    ids, tokens = prompt((VISION, 2), (INSTRUCTION, " ".join(asked) + " "), (RESPONSE, "yes"))
    assert texts(find_words(tokens, ids, TOKENIZER)) == [*asked[-MOST_WORDS + 2 :], NEXT, "yes"]


def test_find_words_text_parts_hold_the_whole_text_without_padding():
    ids, tokens = prompt((PAD, 3), (SYSTEM, "You are. "), (VISION, 4), (INSTRUCTION, "is it red?"))
    words = find_words(tokens, ids, TOKENIZER)
    assert "".join(part.text for part in words.text) == "You are. is it red?"
    assert [part.text for part in words.text if part.word is not None] == ["is", "it", "red?"]
    assert [part.group for part in words.text][:2] == ["system", "vision"]


def test_label_gives_each_word_a_group_and_leaves_all_other_positions():
    ids, tokens = prompt((VISION, 2), (INSTRUCTION, "is it"))
    labelled = find_words(tokens, ids, TOKENIZER).label(tokens)
    assert labelled.mask("word 0: is")[0].nonzero().flatten().tolist() == [2, 3]
    assert labelled.mask("word 1: it")[0].nonzero().flatten().tolist() == [5, 6]
    assert labelled.mask("instruction")[0].nonzero().flatten().tolist() == [4]
    assert torch.equal(labelled.mask("vision"), tokens.mask("vision"))


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [({"words": ["blue"]}, "words", "blue"), ({"question": "was it?"}, "question", "was it?")],
)
def test_find_words_what_is_not_in_the_text_is_named(options, key, value):
    ids, tokens = prompt((VISION, 2), (INSTRUCTION, "is it red?"))
    with pytest.raises(ValueError, match=f"^{key}: ") as caught:
        find_words(tokens, ids, TOKENIZER, **options)
    assert value in str(caught.value)


def test_find_words_several_rows_are_refused():
    ids, tokens = prompt((VISION, 2), (INSTRUCTION, "is it red?"))
    with pytest.raises(ValueError, match="2 rows"):
        find_words(TokenMap(tokens.labels.expand(2, -1)), ids.expand(2, -1), TOKENIZER)
