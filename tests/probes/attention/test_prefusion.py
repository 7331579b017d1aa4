"""`record_attention` in LLaVA-Mini's pre-fusion layers, against weights computed from the input of each layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import rotate_half

from llava_mini import LlavaMiniForConditionalGeneration
from probes import TokenMap
from probes.attention.recording import record_attention
from tests.probes.attention_reference import check_record, expected_statistics
from tests.tiny_models import IMAGE_TOKEN, tiny_llava

Mini = LlavaMiniForConditionalGeneration
VISUAL_TOKENS = 5  # four patches and the token that they are compressed to


@pytest.fixture
def make_mini() -> Callable[..., Mini]:
    def make(implementation: str = "sdpa", **fields: Any) -> Mini:
        model = Mini.from_llava(tiny_llava(), prefusion_layers=2, compressor_size=1, prefusion_init="fresh", **fields)
        model.set_attn_implementation(implementation)
        return model

    return make


def video(frames: int) -> dict[str, torch.Tensor]:
    """Return two rows: text, a video of `frames` frames with a visual token each, text; longer text, one image, text."""
    torch.manual_seed(1)
    first = [3, *[IMAGE_TOKEN] * frames, 5, 6]
    second = [7, 8, 9, IMAGE_TOKEN, 10, 11, 12, 13]
    length = max(len(first), len(second))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in (first, second)])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": torch.randn(frames + 1, 3, 8, 8),
        "visual_layout": torch.tensor([[0, frames, 1], [1, 1, 1]]),
    }


def map_of(frames: int) -> TokenMap:
    """Return the token map of the frames: patches, then the text of the frame's row, then padding."""
    first = [2] * VISUAL_TOKENS + [1] + [3] * 2 + [0] * 4
    second = [2] * VISUAL_TOKENS + [1] * 3 + [3] * 4
    return TokenMap(torch.tensor([first] * frames + [second]), stack="prefusion")


def reference_weights(model: Mini, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the attention weights of each pre-fusion layer, for all frames, computed from the layer's input states."""
    layer_inputs: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, number=number: layer_inputs[number].append(kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for number, layer in enumerate(model.model.prefusion.layers)
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    weights = []
    for number, layer in enumerate(model.model.prefusion.layers):
        attention, hidden = layer.self_attn, torch.cat(layer_inputs[number])
        cos, sin = model.get_decoder().rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        query, key = (
            states * cos[:, None] + rotate_half(states) * sin[:, None]
            for projection in (attention.q_proj, attention.k_proj)
            for states in [projection(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)]
        )
        scores = query @ key.repeat_interleave(2, 1).mT * attention.head_dim**-0.5
        hidden_keys = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights.append(scores.masked_fill(hidden_keys, -torch.inf).softmax(-1).detach())
    return weights


@pytest.mark.parametrize("chunk", [1, 2, 8])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_record_attention_prefusion_any_chunks_equals_reference_weights(
    make_mini: Callable[..., Mini], implementation: str, chunk: int
) -> None:
    model, inputs, tokens = make_mini(implementation, frames_per_chunk=chunk), video(3), map_of(3)
    expected = reference_weights(model, inputs)
    with torch.no_grad(), record_attention(model, tokens) as attention:
        model(**inputs)
    assert attention.layers == (0, 1)
    visible = np.tril(np.ones((12, 12), dtype=bool)) & (tokens.labels.numpy() != 0)[:, None]
    check_record(attention, expected_statistics(expected, tokens, attention.targets, visible))


def test_record_attention_both_stacks_at_once_equals_separate_records(make_mini: Callable[..., Mini]) -> None:
    """The stacks share a config, but not the modules that a record switches."""
    model, inputs = make_mini(), video(2)
    both = [map_of(2), TokenMap.from_inputs(model, inputs)]
    alone = []
    for tokens in both:
        with record_attention(model, tokens) as attention:
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
        alone.append(attention.mass)
    with record_attention(model, both[0]) as inside, record_attention(model, both[1]) as after:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(inside.mass.nan_to_num(), alone[0].nan_to_num())
    assert torch.equal(after.mass.nan_to_num(), alone[1].nan_to_num())
    assert (inside.mass.shape[:2], after.mass.shape[:2]) == ((2, 3), (3, 2))


def test_record_attention_prefusion_map_that_does_not_fit_raises(make_mini: Callable[..., Mini]) -> None:
    model, inputs = make_mini(), video(3)
    for tokens in (map_of(2), TokenMap(map_of(3).labels[:, :-1], stack="prefusion")):
        raises = pytest.raises(ValueError, match=r"pre-fusion was called with 4 x 12")
        with raises, torch.no_grad(), record_attention(model, tokens):
            model(**inputs)
    with torch.no_grad(), record_attention(model, map_of(4)) as attention:
        model(**inputs)
    with pytest.raises(RuntimeError, match=r"not complete: the model ran 4 x 12 of the token map's 5 x 12"):
        _ = attention.mass


def test_record_attention_prefusion_second_prompt_raises(make_mini: Callable[..., Mini]) -> None:
    model, inputs = make_mini(), video(3)
    with torch.no_grad(), record_attention(model, map_of(3)):
        model(**inputs)
        with pytest.raises(RuntimeError, match="second prompt"):
            model(**inputs)


def test_record_attention_unknown_stack_raises(make_llava: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration has no pre-fusion layers"):
        record_attention(make_llava(), map_of(1)).__enter__()
    with pytest.raises(ValueError, match=r"unknown stack 'encoder'.*decoder.*prefusion"):
        record_attention(make_llava(), TokenMap(map_of(1).labels, stack="encoder")).__enter__()
