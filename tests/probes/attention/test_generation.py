"""`record_attention` in generation: chunked prompts, beams, several answers to a prompt, and cropped caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, LlavaForConditionalGeneration, StaticCache

from probes import TokenMap
from probes.attention.record import AttentionRecord
from probes.attention.recording import record_attention
from tests.probes.attention_reference import check_record, expected_statistics

Model = LlavaForConditionalGeneration
Inputs = dict[str, torch.Tensor]


@pytest.mark.parametrize("size", [1, 4, 5, 12])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_record_attention_chunked_prompt_equals_one_pass(
    make_llama: Callable[..., LlamaForCausalLM],
    make_inputs: Callable[..., Inputs],
    implementation: str,
    cache: str,
    size: int,
) -> None:
    """Queries of a later chunk follow the keys of earlier chunks."""
    inputs, model = make_inputs(), make_llama(implementation)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    tokens = TokenMap.from_inputs(model, inputs)
    past: Any = DynamicCache() if cache == "dynamic" else StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        with record_attention(model, tokens) as attention:
            length = 0
            for chunk in ids.split(size, dim=1):
                length += chunk.shape[1]
                model(input_ids=chunk, attention_mask=mask[:, :length], past_key_values=past, use_cache=True)
        attentions = make_llama("eager")(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    check_record(attention, expected_statistics(attentions, tokens, attention.targets))


def test_record_attention_incomplete_prompt_raises(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    inputs, model = make_inputs("none"), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), record_attention(model, tokens) as attention:
        model(**inputs | {name: inputs[name][:, :9] for name in ("input_ids", "attention_mask")})
    with pytest.raises(RuntimeError, match=r"not complete: the model ran 3 x 9 of the token map's 3 x 13 positions"):
        _ = attention.mass


def repeat_prompts(model: Model, inputs: Inputs, copies: int, answers: torch.Tensor) -> tuple[Inputs, TokenMap]:
    """Return inputs with every prompt `copies` times, each followed by an answer, and their token map."""
    rows = {name: inputs[name].repeat_interleave(copies, 0) for name in ("input_ids", "attention_mask")}
    images = inputs["pixel_values"].repeat_interleave(copies, 0)
    steps = answers[:, rows["input_ids"].shape[1] :]
    ids = torch.cat([rows["input_ids"], steps], dim=1)
    mask = torch.nn.functional.pad(rows["attention_mask"], (0, steps.shape[1]), value=1)
    is_step = torch.arange(ids.shape[1]) >= rows["input_ids"].shape[1]
    full = {"input_ids": ids, "attention_mask": mask, "pixel_values": images}
    return full, TokenMap.from_inputs(model, full | {"labels": ids.masked_fill(~is_step.expand_as(ids), -100)})


def test_record_attention_several_answers_has_a_sample_for_each(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """The token map has the prompts only."""
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    torch.manual_seed(0)
    with record_attention(model, tokens) as attention:
        answers = model.generate(**inputs, do_sample=True, num_return_sequences=2, max_new_tokens=4)
    full, full_map = repeat_prompts(model, inputs, 2, answers[:, :-1])
    with torch.no_grad():
        attentions = make_llava("eager")(**full, output_attentions=True).attentions
    check_record(attention, expected_statistics(attentions, full_map, attention.targets))


def test_record_attention_beam_search_has_a_sample_for_each_beam(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """All beams of a prompt have the same attention within it, and recording does not change the generated beams."""
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


def test_record_attention_batch_without_copies_raises(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """Several rows of the model for one row of the map must be copies."""
    inputs, model = make_inputs("left"), make_llava()
    one = {name: values[:1] for name, values in inputs.items()}
    tokens = TokenMap.from_inputs(model, one)
    raises = pytest.raises(ValueError, match=r"the token map has 1 x 13 positions .* was called with 3 x 13")
    with raises, torch.no_grad(), record_attention(model, tokens):
        model(**inputs)


@torch.no_grad()
def test_record_attention_of_one_target_takes_its_name_alone(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    inputs, model = make_inputs("none"), make_llava()
    with record_attention(model, TokenMap.from_inputs(model, inputs), targets="vision") as attention:
        model(**inputs)
    assert attention.targets == ("vision",)


@torch.no_grad()
def test_record_attention_rows_that_differ_in_one_word_raise(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """Image features that are a hundred times larger than words must not hide the word."""
    model = make_llava()
    model.model.multi_modal_projector.linear_2.weight *= 100
    inputs = {name: values[:1].repeat_interleave(2, 0) for name, values in make_inputs("none").items()}
    tokens = TokenMap.from_inputs(model, {name: values[:1] for name, values in inputs.items()})
    with record_attention(model, tokens) as attention:
        model(**inputs)
    assert attention.mass.shape[1] == 2
    inputs["input_ids"][1, -1] = inputs["input_ids"][1, -1] + 1
    with pytest.raises(ValueError, match="was called with 2 x"), record_attention(model, tokens):
        model(**inputs)


def test_record_attention_copies_made_after_prompt_raise(
    make_llama: Callable[..., LlamaForCausalLM], make_inputs: Callable[..., Inputs]
) -> None:
    """Otherwise, a sum over one row and three rows would silently broadcast."""
    model, ids = make_llama(), make_inputs()["input_ids"][:1]
    past = DynamicCache()
    with torch.no_grad(), record_attention(model, TokenMap.from_inputs(model, {"input_ids": ids})):
        model(ids, past_key_values=past)
        past.batch_repeat_interleave(3)
        with pytest.raises(ValueError, match="was called with 3 x 1"):
            model(torch.tensor([[5], [6], [7]]), past_key_values=past)


def test_record_attention_assisted_decoding_raises(
    make_llama: Callable[..., LlamaForCausalLM], make_inputs: Callable[..., Inputs]
) -> None:
    """Its first call has guesses after the prompt; later calls resume at a wrong guess."""
    model, assistant, ids = make_llama(), make_llama(seed=1), make_inputs()["input_ids"][:1]
    tokens = TokenMap.from_inputs(model, {"input_ids": ids})
    with (
        pytest.raises(ValueError, match="generate with a cache and without an assistant"),
        record_attention(model, tokens),
    ):
        model.generate(ids, assistant_model=assistant, max_new_tokens=20, do_sample=False)


def test_record_attention_cropped_cache_raises(
    make_llama: Callable[..., LlamaForCausalLM], make_inputs: Callable[..., Inputs]
) -> None:
    model, ids = make_llama(), make_inputs()["input_ids"][:1]
    past = DynamicCache()
    raises = pytest.raises(RuntimeError, match=r"position 12 after 13.*cache that only grows")
    with torch.no_grad(), record_attention(model, TokenMap.from_inputs(model, {"input_ids": ids})), raises:
        model(ids, past_key_values=past)
        past.crop(-1)
        model(ids[:, -1:], past_key_values=past)


def record_one_pass(model: Model, inputs: Inputs, tokens: TokenMap, **selection: Any) -> AttentionRecord:
    with torch.no_grad(), record_attention(model, tokens, **selection) as attention:
        model(**inputs)
    return attention


@pytest.mark.parametrize("heads", [[0], [3, 1], [0, 1], [2, 3], [1, 2, 3]])
def test_record_attention_selected_heads_are_subset_of_all(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], heads: list[int]
) -> None:
    """Four query heads share two key heads."""
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    all_heads, selected = record_one_pass(model, inputs, tokens), record_one_pass(model, inputs, tokens, heads=heads)
    assert selected.heads == tuple(sorted(heads))
    for name in ("mass", "entropy", "received"):
        expected = getattr(all_heads, name)[:, :, sorted(heads)]
        torch.testing.assert_close(getattr(selected, name), expected, equal_nan=True)
    assert torch.equal(selected.queries, all_heads.queries)
    assert sorted(selected.frame()["head"].unique()) == sorted(heads)


def test_record_attention_computes_only_selected_scores(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cost is the number of attention scores that are computed."""
    inputs, model = make_inputs("left"), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    scores = 0
    softmax = torch.Tensor.softmax

    def count(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal scores
        scores += tensor.numel()
        return softmax(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "softmax", count)

    def cost(**selection: Any) -> int:
        nonlocal scores
        scores = 0
        record_one_pass(model, inputs, tokens, **selection)
        return scores

    whole = cost()
    assert cost(layers=[1]) * 3 == whole
    assert cost(heads=[2]) * 4 == whole
    # Rows with 3, 0 and 0 system tokens can attend to 3 keys at most: 3 rows and 3 columns in a batch of 3.
    assert cost(targets=["system"]) == 3 * 4 * 3 * 3 * 3
