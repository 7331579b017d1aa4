"""`record_attention` under flash, flex, sliding-window, soft-capped and custom attention, against eager attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)
from transformers.masking_utils import flash_attention_mask, sdpa_mask

from probes import TokenMap
from probes.attention.recording import record_attention
from tests.probes.attention_reference import check_record, expected_statistics, label_responses
from tests.tiny_models import tiny_text_config

Model = LlavaForConditionalGeneration
Inputs = dict[str, torch.Tensor]
STAND_IN = "stand_in"


def reference_flash_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Run flash attention in plain operations: no padding in a sample, aligned ends, and a window of the last keys."""
    assert module.config._attn_implementation == STAND_IN, "models choose the kernel by this name"  # type: ignore[union-attr]
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    output = torch.zeros_like(query)
    for sample in range(len(query)):
        is_key = torch.ones(key.shape[2]) if attention_mask is None else attention_mask[sample]
        is_query = is_key[-length:].bool() if length > 1 else torch.ones(1, dtype=torch.bool)
        keys = key[sample, :, : len(is_key)][:, is_key.bool()].repeat_interleave(groups, 0)
        values = value[sample, :, : len(is_key)][:, is_key.bool()].repeat_interleave(groups, 0)
        queries = query[sample][:, is_query]
        distance = torch.arange(keys.shape[1]) - torch.arange(keys.shape[1] - queries.shape[1], keys.shape[1])[:, None]
        hidden = distance > 0
        if sliding_window is not None:
            hidden |= distance <= -sliding_window
        weights = (queries @ keys.mT * scaling).masked_fill(hidden, -torch.inf).softmax(-1)
        output[sample][:, is_query] = weights @ values
    return output.transpose(1, 2), None


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> str:
    """Register an implementation with its own name and the masks of flash attention, as kernels from the hub have."""
    monkeypatch.setitem(AttentionInterface._global_mapping, STAND_IN, reference_flash_attention)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, STAND_IN, flash_attention_mask)
    return STAND_IN


@pytest.fixture
def flex() -> Iterator[str]:
    """Run flex attention as plain operations, since compiling it takes a minute."""
    torch.compiler.set_stance("force_eager")
    yield "flex_attention"
    torch.compiler.set_stance("default")


@pytest.fixture(params=["flash", "flex"])
def implementation(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(request.param)


def expected_with_steps(
    eager: Model, inputs: Inputs, steps: torch.Tensor, targets: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Return the statistics of one eager pass over prompt and steps, with the steps labelled response."""
    mask = nn.functional.pad(inputs["attention_mask"], (0, steps.shape[1]), value=1)
    ids = torch.cat([inputs["input_ids"], steps], dim=1)
    full = {"input_ids": ids, "attention_mask": mask, "pixel_values": inputs["pixel_values"]}
    is_step = torch.arange(ids.shape[1]) >= inputs["input_ids"].shape[1]
    tokens = TokenMap.from_inputs(eager, full | {"labels": ids.masked_fill(~is_step.expand_as(ids), -100)})
    with torch.no_grad():
        return expected_statistics(eager(**full, output_attentions=True).attentions, tokens, targets)


@pytest.mark.parametrize("side", ["left", "right"])
def test_record_attention_prompt_equals_eager_weights(
    implementation: str, make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], side: str
) -> None:
    inputs, model = label_responses(make_inputs(side)), make_llava("sdpa")
    model.get_decoder().set_attn_implementation(implementation)
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad():
        plain = model(**inputs)
        with record_attention(model, tokens) as attention:
            recorded = model(**inputs)
        attentions = make_llava("eager")(**inputs, output_attentions=True).attentions
    check_record(attention, expected_statistics(attentions, tokens, attention.targets))
    assert torch.equal(plain.logits, recorded.logits)
    assert model.get_decoder().config._attn_implementation == implementation


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_record_attention_prompt_and_steps_equals_eager_weights(
    implementation: str, make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], cache: str, side: str
) -> None:
    inputs, steps = make_inputs(side), torch.tensor([[5, 6], [7, 8], [9, 10]])
    if side == "none":
        inputs, steps = {name: values[:1] for name, values in inputs.items()}, steps[:1]
    model = make_llava("sdpa")
    model.get_decoder().set_attn_implementation(implementation)
    mask = inputs["attention_mask"]
    past: Any = DynamicCache()
    if cache == "static":
        if side == "none" and implementation == "flex_attention":
            pytest.skip("attends to empty slots of the cache, which raises (tested below)")
        past = StaticCache(config=model.config.text_config, max_cache_len=mask.shape[1] + 5)
    with torch.no_grad(), record_attention(model, TokenMap.from_inputs(model, inputs)) as attention:
        model(**inputs, past_key_values=past, use_cache=True)
        for step in steps.split(1, dim=1):
            mask = nn.functional.pad(mask, (0, 1), value=1)
            model(input_ids=step, attention_mask=mask, past_key_values=past, use_cache=True)
    check_record(attention, expected_with_steps(make_llava("eager"), inputs, steps, attention.targets))


@pytest.mark.slow
def test_record_attention_compiled_flex_attention_equals_eager_weights(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    inputs, model = make_inputs(), make_llava("sdpa")
    model.get_decoder().set_attn_implementation("flex_attention")
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad():
        with record_attention(model, tokens) as attention:
            model(**inputs)
        attentions = make_llava("eager")(**inputs, output_attentions=True).attentions
    check_record(attention, expected_statistics(attentions, tokens, attention.targets))


def test_record_attention_custom_implementation_needs_known_masks(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The masks of an implementation determine how to record it; without masks it raises."""
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), record_attention(model, tokens) as plain:
        model(**inputs)
    monkeypatch.setitem(AttentionInterface._global_mapping, "custom", AttentionInterface()["sdpa"])
    model.get_decoder().set_attn_implementation("custom")
    with pytest.raises(ValueError, match="attention implementation 'custom' cannot be probed"):
        record_attention(model, tokens).__enter__()
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "custom", sdpa_mask)
    with torch.no_grad(), record_attention(model, tokens) as custom:
        model(**inputs)
    assert torch.equal(custom.mass.nan_to_num(), plain.mass.nan_to_num())


SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "image_token_id": 63,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
IDS = torch.tensor([[3, 63, 63, 4, 5, 6, 7, 8, 9, 10, 11, 12]])


def make_token_map(ids: torch.Tensor) -> TokenMap:
    """Return the token map `[system, vision, vision, instruction ...]`."""
    labels = torch.full_like(ids, 3)
    labels[:, :3] = torch.tensor([1, 2, 2])
    return TokenMap(labels)


@pytest.mark.parametrize("chunks", [(12,), (9, 1, 1, 1)])
def test_record_attention_flash_sliding_window_equals_eager_weights(flash: str, chunks: tuple[int, ...]) -> None:
    """A window of 4, also with a cache that has dropped the oldest keys."""
    torch.manual_seed(0)
    model = MistralForCausalLM(tiny_text_config(MistralConfig, **SMALL, sliding_window=4)).eval()
    model.set_attn_implementation(flash)
    past = DynamicCache(config=model.config)
    with torch.no_grad(), record_attention(model, make_token_map(IDS)) as attention:
        for part in IDS.split(chunks, dim=1):
            model(part, past_key_values=past, use_cache=True)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(IDS, output_attentions=True, use_cache=False).attentions
    distance = np.arange(12)[:, None] - np.arange(12)
    visible = ((distance >= 0) & (distance < 4))[None]
    check_record(attention, expected_statistics(attentions, make_token_map(IDS), attention.targets, visible))


def test_record_attention_soft_capped_scores_equal_eager_weights() -> None:
    """Gemma 2 with a cap so low that it changes every weight, in full and in sliding layers."""
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        tiny_text_config(Gemma2Config, **SMALL, attn_logit_softcapping=0.5, sliding_window=4)
    ).eval()
    model.set_attn_implementation("eager")
    tokens = make_token_map(IDS)
    with torch.no_grad(), record_attention(model, tokens) as attention:
        attentions = model(IDS, output_attentions=True).attentions
    distance = np.arange(12)[:, None] - np.arange(12)
    for layer, window in enumerate((4, 12)):
        visible = ((distance >= 0) & (distance < window))[None]
        expected = expected_statistics(attentions[layer : layer + 1], tokens, attention.targets, visible)
        for name, values in expected.items():
            np.testing.assert_allclose(getattr(attention, name)[layer].numpy(), values[0], atol=1e-5, rtol=0)


def test_record_attention_sinks_equal_eager_weights() -> None:
    """gpt-oss: eager attention returns its weights without the sink's share."""
    torch.manual_seed(0)
    config = tiny_text_config(
        GptOssConfig, **SMALL, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"] * 2
    )
    model = GptOssForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.sinks, mean=2.0)
    tokens = make_token_map(IDS)
    with torch.no_grad(), record_attention(model, tokens, heads=[1]) as attention:
        attentions = model(IDS, output_attentions=True).attentions
    check_record(attention, expected_statistics([weights[:, 1:] for weights in attentions], tokens, attention.targets))
    assert attention.mass[..., 1, 1:3].sum() < 0.9 * attention.mass[..., 1, 1:3].numel()


def test_record_attention_flash_packed_sequences_raise(flash: str) -> None:
    model = MistralForCausalLM(tiny_text_config(MistralConfig, **SMALL)).eval()
    model.set_attn_implementation(flash)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    raises = pytest.raises(ValueError, match="several sequences packed into a row")
    with raises, torch.no_grad(), record_attention(model, make_token_map(IDS)):
        model(IDS, position_ids=positions, use_cache=False)


def test_record_attention_flex_bool_mask_raises(
    flex: str, make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """Flex attention would add 0 and 1 to the scores."""
    inputs, model = make_inputs(), make_llava("sdpa")
    model.get_decoder().set_attn_implementation(flex)
    tokens = TokenMap.from_inputs(model, inputs)
    inputs["attention_mask"] = torch.ones(3, 1, 13, 13, dtype=torch.bool).tril()
    raises = pytest.raises(ValueError, match="flex attention adds its mask")
    with raises, torch.no_grad(), record_attention(model, tokens):
        model(**inputs)


def test_record_attention_visible_empty_cache_slots_raise(
    flex: str, make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """Without padding, transformers' flex mask uses the static cache's length after the call has extended it."""
    inputs = {name: values[:1] for name, values in make_inputs("none").items()}
    model = make_llava("sdpa")
    model.get_decoder().set_attn_implementation(flex)
    past = StaticCache(config=model.config.text_config, max_cache_len=18)
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), record_attention(model, tokens):
        model(**inputs, past_key_values=past, use_cache=True)
        with pytest.raises(ValueError, match="the model attends to empty slots of its cache"):
            model(input_ids=inputs["input_ids"][:, :1], past_key_values=past, use_cache=True)
