"""Words as targets against the model's own eager attention: the sources stay the groups of the token map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlavaForConditionalGeneration

from probes import TokenMap, record_attention
from probes.view.words import Word, Words
from tests.tiny_models import LAYERS, PATCHES

# The second word lies across the boundary of two groups.
WORDS = Words(
    (Word("early", "system", (1, 2)), Word("middle", "instruction", (8, 9)), Word("last", "response", (11,))), ()
)


def prompt(make_rows: Callable[..., dict[str, torch.Tensor]], model: Any) -> tuple[dict[str, torch.Tensor], TokenMap]:
    """Return a prompt with its answer, and its token map."""
    inputs = make_rows([(3, PATCHES, 6)], "left")
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, 9:] = inputs["input_ids"][0, 9:]
    return inputs, TokenMap.from_inputs(model, {**inputs, "labels": labels})


def word_masses(attentions: tuple[torch.Tensor, ...], tokens: TokenMap) -> torch.Tensor:
    """Return each word's mean attention to each group [layers, heads, words, groups]; NaN for a group after it."""
    matrices, masks = torch.stack(attentions)[:, 0], [tokens.mask(group)[0] for group in tokens.groups]
    masses = torch.full((len(matrices), matrices.shape[1], len(WORDS.words), len(masks)), torch.nan)
    for index, word in enumerate(WORDS.words):
        for group, mask in enumerate(masks):
            seeing = [position for position in word.positions if mask[: position + 1].any()]
            if seeing:
                masses[:, :, index, group] = matrices[:, :, seeing][..., mask].sum(-1).mean(-1)
    return masses


@pytest.mark.parametrize("statistics", [["mass"], ["mass", "entropy", "received"]])
@pytest.mark.parametrize("backend", ["native", "nnsight"])
def test_record_attention_words_are_targets_and_no_sources(
    make_llava: Callable[..., LlavaForConditionalGeneration],
    make_rows: Callable[..., dict[str, torch.Tensor]],
    statistics: list[str],
    backend: str,
) -> None:
    model = make_llava()
    inputs, tokens = prompt(make_rows, model)
    with torch.no_grad():
        with record_attention(model, tokens, words=WORDS, statistics=statistics, backend=backend) as attention:
            model(**inputs)
        expected = word_masses(make_llava("eager")(**inputs, output_attentions=True).attentions, tokens)
    assert attention.sources == tokens.groups
    assert attention.targets == WORDS.groups
    torch.testing.assert_close(attention.mass[:, 0], expected, rtol=0, atol=1e-5, equal_nan=True)
    assert attention.queries[0, 0, :, tokens.index("instruction")].tolist() == [0, 2, 1]


def test_record_attention_words_in_calls_that_share_a_cache_equal_one_call(
    make_llava: Callable[..., LlavaForConditionalGeneration], make_rows: Callable[..., dict[str, torch.Tensor]]
) -> None:
    model = make_llava()
    inputs, tokens = prompt(make_rows, model)
    ids, cache = inputs["input_ids"], DynamicCache()
    with torch.no_grad():
        with record_attention(model, tokens, words=WORDS) as whole:
            model(**inputs)
        with record_attention(model, tokens, words=WORDS) as parts:
            model(input_ids=ids[:, :8], pixel_values=inputs["pixel_values"], past_key_values=cache)
            for position in range(8, ids.shape[1] + 2):  # the last two are generated
                next_ids = ids[:, position : position + 1] if position < ids.shape[1] else ids[:, -1:]
                model(input_ids=next_ids, past_key_values=cache)
    assert len(whole.layers) == LAYERS
    torch.testing.assert_close(parts.mass, whole.mass, rtol=0, atol=1e-5, equal_nan=True)
    length = ids.shape[1]
    torch.testing.assert_close(parts.received[..., :length], whole.received, rtol=0, atol=1e-5, equal_nan=True)


def test_record_attention_words_with_other_targets_records_these_alone(
    make_llava: Callable[..., LlavaForConditionalGeneration], make_rows: Callable[..., dict[str, torch.Tensor]]
) -> None:
    model = make_llava()
    inputs, tokens = prompt(make_rows, model)
    targets = ("vision", *WORDS.groups[1:2])
    with torch.no_grad(), record_attention(model, tokens, words=WORDS, targets=targets) as attention:
        model(**inputs)
    assert attention.targets == targets
    assert attention.queries[0, 0, :, tokens.index("vision")].tolist() == [PATCHES, 2]
    with pytest.raises(ValueError, match="word 9"), record_attention(model, tokens, words=WORDS, targets=["word 9: x"]):
        pass


def test_record_attention_group_that_holds_words_as_target_raises(
    make_llava: Callable[..., LlavaForConditionalGeneration], make_rows: Callable[..., dict[str, torch.Tensor]]
) -> None:
    """Each position is of one target, so the group would be recorded without its words."""
    model = make_llava()
    _, tokens = prompt(make_rows, model)
    raises = pytest.raises(ValueError, match=r"targets: .*'instruction'.*'middle'")
    with raises, record_attention(model, tokens, targets=["instruction"], words=WORDS):
        pass
