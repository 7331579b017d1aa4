"""Probes of a call that continues a cache from before the block, against one pass over the whole conversation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, LlavaForConditionalGeneration

from probes import RemoveTokens, TokenMap, intervene, record_attention
from tests.probes.attention_reference import check_record, expected_statistics
from tests.tiny_models import IMAGE_TOKEN

CACHED, LENGTH = 7, 12
CONVERSATION = torch.tensor([[5, IMAGE_TOKEN, IMAGE_TOKEN, 6, 7, 8, 9, 10, IMAGE_TOKEN, 11, 12, 13]])


def cache_of_first_turn(model: LlamaForCausalLM, length: int = CACHED) -> DynamicCache:
    cache = DynamicCache()
    with torch.no_grad():
        model(CONVERSATION[:, :length], past_key_values=cache)
    return cache


def test_record_attention_second_turn_on_cache_equals_rows_of_one_pass(
    make_llama: Callable[..., LlamaForCausalLM],
) -> None:
    """The map describes both turns. Only queries of the second turn are recorded."""
    model, tokens = make_llama(), TokenMap.from_inputs(make_llama(), {"input_ids": CONVERSATION})
    cache = cache_of_first_turn(model)
    with torch.no_grad():
        with record_attention(model, tokens) as attention:
            model(CONVERSATION[:, CACHED:], past_key_values=cache)
        attentions = make_llama("eager")(CONVERSATION, output_attentions=True).attentions
    visible = np.tril(np.ones((1, LENGTH, LENGTH), dtype=bool))
    visible[:, :CACHED] = False
    check_record(attention, expected_statistics(attentions, tokens, attention.targets, visible))


@pytest.mark.parametrize("first", [CACHED, 9], ids=["longer cache", "call beyond map"])
def test_probe_map_of_second_turn_alone_raises(make_llama: Callable[..., LlamaForCausalLM], first: int) -> None:
    """Its groups would be those of the first turn's positions: the cached ones are the first keys of the call."""
    model, second = make_llama(), CONVERSATION[:, CACHED:] if first == CACHED else CONVERSATION[:, 1:9]
    cached = CACHED if first == CACHED else 3
    tokens = TokenMap.from_inputs(model, {"input_ids": second})
    for probe in (record_attention(model, tokens), intervene(model, tokens, RemoveTokens("vision", [1]))):
        cache = cache_of_first_turn(model, cached)
        message = rf"{second.shape[1]} positions after {cached} in its cache, but the token map has {second.shape[1]};"
        with pytest.raises(ValueError, match=message), torch.no_grad(), probe:
            model(second, past_key_values=cache)


def test_probe_map_as_long_as_cache_and_call_raises(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    model, second = make_llama(), CONVERSATION[:, 5:]
    tokens = TokenMap.from_inputs(model, {"input_ids": second})
    cache = cache_of_first_turn(model, 7)
    raises = pytest.raises(ValueError, match="build the map from the whole conversation")
    with raises, torch.no_grad(), record_attention(model, tokens):
        model(second, past_key_values=cache)


def test_remove_tokens_prompt_cached_before_block_acts_on_its_continuation(
    make_llama: Callable[..., LlamaForCausalLM],
) -> None:
    """The map of a cached prompt still fits an answer of several tokens, and single steps."""
    model, answer = make_llama(), torch.tensor([[20, 21, 22]])
    prompt = CONVERSATION[:, :CACHED]
    tokens = TokenMap.from_inputs(model, {"input_ids": prompt})
    cut = RemoveTokens("vision", range(3))
    with torch.no_grad():
        cache = cache_of_first_turn(model)
        with intervene(model, tokens, cut):
            at_once = model(answer, past_key_values=cache).logits
        cache, steps = cache_of_first_turn(model), []
        with intervene(model, tokens, cut):
            for step in answer.split(1, dim=1):
                steps.append(model(step, past_key_values=cache).logits)
        eager, cache = make_llama("eager"), cache_of_first_turn(model)
        mask = torch.ones(3, CACHED + 3, dtype=torch.bool).tril(CACHED)
        mask[:, 1:3] = False  # the two visual tokens
        bias = torch.zeros(1, 1, 3, CACHED + 3).masked_fill(~mask, torch.finfo(torch.float32).min)
        expected = eager(answer, attention_mask=bias, past_key_values=cache).logits
    torch.testing.assert_close(at_once, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=2e-5, rtol=1e-5)


def test_generate_without_cache_in_block_raises(
    make_llava: Callable[..., LlavaForConditionalGeneration], make_inputs: Callable[..., dict[str, torch.Tensor]]
) -> None:
    """Each step calls the model with a longer prompt, which the map does not describe."""
    model, inputs = make_llava(), make_inputs()
    raises = pytest.raises(ValueError, match=r"3 x 14; .* generate with a cache")
    with raises, record_attention(model, TokenMap.from_inputs(model, inputs)):
        model.generate(**inputs, max_new_tokens=2, do_sample=False, use_cache=False)
