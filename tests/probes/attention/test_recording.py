"""`record_attention` against statistics computed from full attention matrices."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AttentionInterface,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

from probes import TokenMap, record_attention
from probes.attention import layout
from probes.attention.attention_switch import SWITCHED
from tests.probes.attention_reference import check_record, expected_statistics, label_responses
from tests.tiny_models import tiny_text_config

Model = LlavaForConditionalGeneration
Inputs = dict[str, torch.Tensor]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_record_attention_equals_statistics_of_full_matrices(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], side: str, implementation: str
) -> None:
    inputs, model = label_responses(make_inputs(side)), make_llava(implementation)
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad():
        attentions = make_llava("eager")(**inputs, output_attentions=True).attentions
        plain = model(**inputs)
        with record_attention(model, tokens) as attention:
            recorded = model(**inputs)

    assert attention.layers == (0, 1, 2)
    assert attention.targets == ("system", "vision", "instruction", "response")
    assert attention.sources == tokens.groups
    check_record(attention, expected_statistics(attentions, tokens, attention.targets))
    assert torch.equal(plain.logits, recorded.logits), "recording does not change the output"
    # The third row has no image: its entries are undefined, not zero.
    assert attention.mass[:, 2, :, attention.targets.index("instruction"), tokens.index("vision")].isnan().all()


def test_attention_record_received_sums_to_mass(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """Every instruction token comes after the image and can attend to all of it, so both denominators are equal."""
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), record_attention(model, tokens, targets=["instruction"]) as attention:
        model(**inputs)
    received = attention.received[:, :2, :, 0].masked_fill(~tokens.mask("vision")[None, :2, None], 0.0).sum(-1)
    torch.testing.assert_close(received, attention.mass[:, :2, :, 0, tokens.index("vision")])


@pytest.mark.parametrize("scores", [1, 500])
def test_record_attention_any_chunk_size_gives_same_statistics(
    make_llava: Callable[..., Model],
    make_inputs: Callable[..., Inputs],
    monkeypatch: pytest.MonkeyPatch,
    scores: int,
) -> None:
    """With memory for one score, a chunk is one query: no matrix of all queries is needed."""
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), record_attention(model, tokens) as whole:
        model(**inputs)
    monkeypatch.setattr(layout, "SCORES_PER_CHUNK", scores)
    largest = (0, 0)
    softmax = torch.Tensor.softmax

    def watch(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, (tensor.shape[2], tensor.numel()))
        return softmax(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "softmax", watch)
    with torch.no_grad(), record_attention(model, tokens) as chunked:
        model(**inputs)
    # Two heads at a time: those that share a key head.
    assert largest[0] == max(scores // (3 * 2 * (3 + 4 + 7 + 6)), 1)
    assert largest[1] <= max(scores, 3 * 2 * 7), "no more scores than the limit, or than one query needs"
    for name in ("mass", "entropy", "received", "queries"):
        torch.testing.assert_close(getattr(chunked, name), getattr(whole, name), equal_nan=True)


def test_record_attention_selected_layers_and_targets_are_subset_of_all(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad():
        with record_attention(model, tokens) as whole:
            model(**inputs)
        with record_attention(model, tokens, layers=[2, 0], targets=["instruction", "system"]) as selected:
            model(**inputs)
    assert (selected.layers, selected.targets) == ((0, 2), ("instruction", "system"))
    indices = [whole.targets.index(target) for target in selected.targets]
    torch.testing.assert_close(selected.mass, whole.mass[[0, 2]][:, :, :, indices], equal_nan=True)


def test_record_attention_target_missing_from_a_call_equals_whole_record(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """The prompt has no response, and the steps have nothing else."""
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    with record_attention(model, tokens) as whole:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    for target in ("instruction", "response"):
        with record_attention(model, tokens, targets=[target]) as one:
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
        index = whole.targets.index(target)
        torch.testing.assert_close(one.mass[:, :, :, 0], whole.mass[:, :, :, index], equal_nan=True)
        torch.testing.assert_close(one.received[:, :, :, 0], whole.received[:, :, :, index], equal_nan=True)


def test_record_attention_merged_groups_are_axes_of_record(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    inputs, model = make_inputs(), make_llava("eager")
    tokens = TokenMap.from_inputs(model, inputs).merge({"text": ["system", "instruction", "response"]})
    with torch.no_grad(), record_attention(model, tokens) as attention:
        attentions = model(**inputs, output_attentions=True).attentions
    assert attention.targets == ("text", "vision")
    check_record(attention, expected_statistics(attentions, tokens, attention.targets))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_record_attention_decoded_tokens_count_as_response(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], cache: str, side: str
) -> None:
    """A prompt and two cached steps equal one eager pass over all tokens, with the steps labelled response.

    Without padding, sdpa gets no mask: attention is causal in the prompt, and a step attends to all keys.
    """
    inputs, steps = make_inputs(side), torch.tensor([[5, 6], [7, 8], [9, 10]])
    if side == "none":
        inputs, steps = {name: values[:1] for name, values in inputs.items()}, steps[:1]
    model = make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    mask, length = inputs["attention_mask"], inputs["input_ids"].shape[1]
    past = StaticCache(config=model.config.text_config, max_cache_len=length + 5) if cache == "static" else None
    with torch.no_grad(), record_attention(model, tokens) as attention:
        past = model(**inputs, past_key_values=past, use_cache=True).past_key_values
        for step in steps.split(1, dim=1):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            model(input_ids=step, attention_mask=mask, past_key_values=past, use_cache=True)

    full = {
        "input_ids": torch.cat([inputs["input_ids"], steps], dim=1),
        "attention_mask": mask,
        "pixel_values": inputs["pixel_values"],
    }
    is_step = torch.arange(length + 2) >= length
    full_map = TokenMap.from_inputs(
        model, full | {"labels": full["input_ids"].masked_fill(~is_step.expand_as(full["input_ids"]), -100)}
    )
    eager = make_llava("eager")
    with torch.no_grad():
        attentions = eager(**full, output_attentions=True).attentions
    check_record(attention, expected_statistics(attentions, full_map, attention.targets))


def test_record_attention_generate_keeps_output_and_records_steps(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    plain = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with record_attention(model, tokens) as attention:
        recorded = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(plain, recorded)
    response = attention.targets.index("response")
    # The last of the four tokens is never fed back.
    assert (attention.queries[:, :2, response, tokens.index("vision")] == 3).all()
    assert attention.received.shape[-1] == inputs["input_ids"].shape[1] + 3


def test_record_attention_bfloat16_is_close_to_eager_weights(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """Eager attention computes scores in bfloat16 and rounds its weights to bfloat16 (8 bits)."""
    inputs, model = make_inputs(), make_llava().bfloat16()
    eager = make_llava("eager").bfloat16()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad():
        attentions = eager(**inputs, output_attentions=True).attentions
        with record_attention(model, tokens) as attention:
            model(**inputs)
    expected = expected_statistics(attentions, tokens, attention.targets)
    check_record(attention, {name: expected[name] for name in ("mass", "entropy", "received")}, atol=0.03)


@pytest.mark.parametrize("steps", [0, 3])
def test_record_attention_sliding_window_hides_keys(steps: int) -> None:
    """A window of 4 over 9 positions, then with a cache that has dropped the oldest keys."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = tiny_text_config(
        MistralConfig, **sizes, num_key_value_heads=1, sliding_window=4, image_token_id=63, eos_token_id=None
    )
    model = MistralForCausalLM(config).eval()
    ids = torch.tensor([[3, 63, 63, 4, 5, 6, 7, 8, 9, 10, 11, 12]])[:, : 9 + steps]
    tokens = TokenMap.from_inputs(model, {"input_ids": ids[:, :9]})
    with torch.no_grad(), record_attention(model, tokens) as attention:
        past = model(ids[:, :9], use_cache=True).past_key_values
        for step in range(9, 9 + steps):
            model(ids[:, step : step + 1], past_key_values=past, use_cache=True)

    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, output_attentions=True, use_cache=False).attentions
    labels = ids.masked_fill(torch.arange(9 + steps) < 9, -100)
    full_map = TokenMap.from_inputs(model, {"input_ids": ids, "labels": labels})
    distance = np.arange(9 + steps)[:, None] - np.arange(9 + steps)
    visible = ((distance >= 0) & (distance < 4))[None]
    check_record(attention, expected_statistics(attentions, full_map, attention.targets, visible))


def test_record_attention_skips_layers_outside_decoder(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """A copy of the first layer runs before the decoder with the decoder's config, as a pre-fusion layer does."""
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), record_attention(model, tokens) as alone:
        model(**inputs)
    decoder = model.get_decoder()
    extra = type(decoder.layers[0])(decoder.config, layer_idx=0)
    calls = 0

    def prefuse(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal calls
        hidden = kwargs["inputs_embeds"]
        positions = torch.arange(hidden.shape[1])[None]
        extra(hidden, position_embeddings=decoder.rotary_emb(hidden, positions), attention_mask=None)
        calls += 1

    decoder.register_forward_pre_hook(prefuse, with_kwargs=True)
    with torch.no_grad(), record_attention(model, tokens) as beside:
        model(**inputs)
    assert calls == 1
    assert torch.equal(alone.queries, beside.queries)
    torch.testing.assert_close(alone.mass, beside.mass, equal_nan=True)


def test_attention_record_frame_has_row_for_each_entry(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), record_attention(model, tokens, layers=[1, 2]) as attention:
        model(**inputs)
    frame = attention.frame()
    assert list(frame.columns) == ["layer", "sample", "head", "target", "source", "mass", "entropy", "queries"]
    assert len(frame) == 2 * 3 * 4 * 4 * 5
    row = frame.query("layer == 2 and sample == 1 and head == 3 and target == 'instruction' and source == 'vision'")
    entry = (1, 1, 3, attention.targets.index("instruction"), tokens.index("vision"))
    assert row.mass.item() == attention.mass[entry].item()
    assert row.entropy.item() == attention.entropy[entry].item()
    assert row["queries"].item() == 4


def test_import_probes_does_not_import_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    # A second import registers the dispatch of attention calls again: restore that of the first import afterwards.
    dispatch = AttentionInterface._global_mapping[SWITCHED]
    monkeypatch.setitem(AttentionInterface._global_mapping, SWITCHED, dispatch)
    for name in list(sys.modules):
        if name.partition(".")[0] in ("probes", "pandas"):
            monkeypatch.delitem(sys.modules, name)
    importlib.import_module("probes")
    assert "probes.attention.recorder" in sys.modules
    assert "pandas" not in sys.modules
