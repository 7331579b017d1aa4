"""Prompts in chunks, beams, several answers to a prompt, and decoding that goes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, LlavaForConditionalGeneration, StaticCache

from probes import TokenMap
from probes.attention.record import AttentionRecord
from probes.attention.recording import record_attention
from tests.probes.by_definition import by_definition, check

Model = LlavaForConditionalGeneration
Inputs = dict[str, torch.Tensor]


@pytest.mark.parametrize("size", [1, 4, 5, 12])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_prompt_in_chunks(
    make_llama: Callable[..., LlamaForCausalLM],
    make_inputs: Callable[..., Inputs],
    implementation: str,
    cache: str,
    size: int,
) -> None:
    """Queries of a later chunk come behind keys of an earlier one: the same as one pass."""
    inputs, model = make_inputs(), make_llama(implementation)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    tokens = TokenMap.from_inputs(model, inputs)
    past: Any = DynamicCache() if cache == "dynamic" else StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        with record_attention(model, tokens) as attention:
            seen = 0
            for chunk in ids.split(size, dim=1):
                seen += chunk.shape[1]
                model(input_ids=chunk, attention_mask=mask[:, :seen], past_key_values=past, use_cache=True)
        attentions = make_llama("eager")(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    check(attention, by_definition(attentions, tokens, attention.targets))


def test_a_prompt_that_stops_half_way(make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]) -> None:
    inputs, model = make_inputs("none"), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), record_attention(model, tokens) as attention:
        model(**inputs | {name: inputs[name][:, :9] for name in ("input_ids", "attention_mask")})
    with pytest.raises(RuntimeError, match=r"not complete: the model ran 3 x 9 of the token map's 3 x 13 positions"):
        _ = attention.mass


def expanded(model: Model, inputs: Inputs, copies: int, answers: torch.Tensor) -> tuple[Inputs, TokenMap]:
    """Every prompt `copies` times with its answers behind it, as one call."""
    rows = {name: inputs[name].repeat_interleave(copies, 0) for name in ("input_ids", "attention_mask")}
    images = inputs["pixel_values"].repeat_interleave(copies, 0)
    steps = answers[:, rows["input_ids"].shape[1] :]
    ids = torch.cat([rows["input_ids"], steps], dim=1)
    mask = torch.nn.functional.pad(rows["attention_mask"], (0, steps.shape[1]), value=1)
    is_step = torch.arange(ids.shape[1]) >= rows["input_ids"].shape[1]
    full = {"input_ids": ids, "attention_mask": mask, "pixel_values": images}
    return full, TokenMap.from_inputs(model, full | {"labels": ids.masked_fill(~is_step.expand_as(ids), -100)})


def test_several_answers_to_a_prompt(make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]) -> None:
    """The map is of the prompts; the record has a sample for each answer."""
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    torch.manual_seed(0)
    with record_attention(model, tokens) as attention:
        answers = model.generate(**inputs, do_sample=True, num_return_sequences=2, max_new_tokens=4)
    full, full_map = expanded(model, inputs, 2, answers[:, :-1])
    with torch.no_grad():
        attentions = make_llava("eager")(**full, output_attentions=True).attentions
    check(attention, by_definition(attentions, full_map, attention.targets))


def test_beams(make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]) -> None:
    """All beams of a prompt attend alike in it; recording does not change which of them win."""
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    plain = model.generate(**inputs, num_beams=3, max_new_tokens=4, do_sample=False)
    with record_attention(model, tokens) as attention:
        beams = model.generate(**inputs, num_beams=3, max_new_tokens=4, do_sample=False)
    assert torch.equal(plain, beams)
    assert attention.mass.shape[1] == 9
    with torch.no_grad(), record_attention(model, tokens) as prompt:
        model(**inputs)
    texts = [attention.targets.index(name) for name in ("system", "vision", "instruction")]
    torch.testing.assert_close(
        attention.mass[:, :, :, texts], prompt.mass[:, :, :, texts].repeat_interleave(3, 1), equal_nan=True
    )
    response = attention.targets.index("response")
    assert (attention.queries[:, :6, response, tokens.index("vision")] == 3).all()
    total = attention.mass[:, :, :, response].nan_to_num().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_a_batch_that_repeats_nothing_is_refused(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """Two rows of the model for each row of the map must be copies."""
    inputs, model = make_inputs("left"), make_llava()
    one = {name: values[:1] for name, values in inputs.items()}
    tokens = TokenMap.from_inputs(model, one)
    refused = pytest.raises(ValueError, match=r"the token map has 1 x 13 positions .* was called with 3 x 13")
    with refused, torch.no_grad(), record_attention(model, tokens):
        model(**inputs)


def test_copies_made_after_the_prompt_are_refused(
    make_llama: Callable[..., LlamaForCausalLM], make_inputs: Callable[..., Inputs]
) -> None:
    """A sum over one row and three would silently broadcast."""
    model, ids = make_llama(), make_inputs()["input_ids"][:1]
    past = DynamicCache()
    with torch.no_grad(), record_attention(model, TokenMap.from_inputs(model, {"input_ids": ids})):
        model(ids, past_key_values=past)
        past.batch_repeat_interleave(3)
        with pytest.raises(ValueError, match="was called with 3 x 1"):
            model(torch.tensor([[5], [6], [7]]), past_key_values=past)


def test_assisted_decoding_is_refused(
    make_llama: Callable[..., LlamaForCausalLM], make_inputs: Callable[..., Inputs]
) -> None:
    """Its first call holds guesses behind the prompt; later ones go back to where a guess was wrong."""
    model, assistant, ids = make_llama(), make_llama(seed=1), make_inputs()["input_ids"][:1]
    tokens = TokenMap.from_inputs(model, {"input_ids": ids})
    with pytest.raises(ValueError, match="generate without an assistant"), record_attention(model, tokens):
        model.generate(ids, assistant_model=assistant, max_new_tokens=20, do_sample=False)


def test_a_cache_that_goes_back_is_refused(
    make_llama: Callable[..., LlamaForCausalLM], make_inputs: Callable[..., Inputs]
) -> None:
    model, ids = make_llama(), make_inputs()["input_ids"][:1]
    past = DynamicCache()
    refused = pytest.raises(
        RuntimeError, match="went on at position 12 after 13: probes follow a cache that only grows"
    )
    with torch.no_grad(), record_attention(model, TokenMap.from_inputs(model, {"input_ids": ids})), refused:
        model(ids, past_key_values=past)
        past.crop(-1)
        model(ids[:, -1:], past_key_values=past)


def recorded_in(model: Model, inputs: Inputs, tokens: TokenMap, **choice: Any) -> AttentionRecord:
    with torch.no_grad(), record_attention(model, tokens, **choice) as attention:
        model(**inputs)
    return attention


@pytest.mark.parametrize("heads", [[0], [3, 1], [0, 1], [2, 3], [1, 2, 3]])
def test_chosen_heads(make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], heads: list[int]) -> None:
    """Four query heads share two key heads."""
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    everything, chosen = recorded_in(model, inputs, tokens), recorded_in(model, inputs, tokens, heads=heads)
    assert chosen.heads == tuple(sorted(heads))
    for name in ("mass", "entropy", "received"):
        expected = getattr(everything, name)[:, :, sorted(heads)]
        torch.testing.assert_close(getattr(chosen, name), expected, equal_nan=True)
    assert torch.equal(chosen.queries, everything.queries)
    assert sorted(chosen.frame()["head"].unique()) == sorted(heads)


def test_what_is_not_asked_for_costs_nothing(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in attention scores that are computed."""
    inputs, model = make_inputs("left"), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    scores = 0
    softmax = torch.Tensor.softmax

    def count(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal scores
        scores += tensor.numel()
        return softmax(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "softmax", count)

    def cost(**choice: Any) -> int:
        nonlocal scores
        scores = 0
        recorded_in(model, inputs, tokens, **choice)
        return scores

    whole = cost()
    assert cost(layers=[1]) * 3 == whole
    assert cost(heads=[2]) * 4 == whole
    # Rows of 3, 0 and 0 system tokens see 3 keys at most: 3 rows and 3 columns in a batch of 3.
    assert cost(targets=["system"]) == 3 * 4 * 3 * 3 * 3
