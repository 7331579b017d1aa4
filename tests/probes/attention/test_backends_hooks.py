"""Which hooks of a bridge can fire is told beforehand, for every one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen3Config

from probes.attention.backends.transformer_lens import check_hooks, unavailable_hooks, wrap
from tests.probes.conftest import IMAGE_TOKEN

Inputs = dict[str, torch.Tensor]


@pytest.fixture
def bridge(make_llava: Callable[..., LlavaForConditionalGeneration]) -> TransformerBridge:
    return wrap(make_llava())


def fired(bridge: TransformerBridge, inputs: Inputs) -> set[str]:
    """Names of all hooks that fire, found without the bridge's ways to add hooks."""
    seen: set[int] = set()
    for point in bridge.hook_dict.values():
        point.register_forward_hook(lambda point, args, output: seen.add(id(point)))
    bridge.original_model(**inputs)
    return {name for name, point in bridge.hook_dict.items() if id(point) in seen}


@torch.no_grad()
def test_all_others_fire(bridge: TransformerBridge, make_inputs: Callable[..., Inputs]) -> None:
    unavailable = unavailable_hooks(bridge)
    assert fired(bridge, make_inputs()) == bridge.hook_dict.keys() - unavailable.keys()
    assert "vision_projector.hook_out" in unavailable["vision_projector.hook_projected"]
    assert "blocks.0.attn.hook_q_normed" in unavailable
    assert unavailable["blocks.1.hook_mlp_in"] == "call set_use_hook_mlp_in(True) on the bridge first"


@torch.no_grad()
def test_all_others_fire_with_norms_of_queries(
    make_llava: Callable[..., LlavaForConditionalGeneration], make_inputs: Callable[..., Inputs]
) -> None:
    llama = make_llava().config
    text = Qwen3Config(**{name: getattr(llama.text_config, name) for name in SIZES}, head_dim=8)
    config = LlavaConfig(vision_config=llama.vision_config, text_config=text, image_token_id=IMAGE_TOKEN)
    bridge = wrap(LlavaForConditionalGeneration(config).eval())
    unavailable = unavailable_hooks(bridge)
    assert fired(bridge, make_inputs()) == bridge.hook_dict.keys() - unavailable.keys()
    assert "blocks.0.attn.hook_q_normed" not in unavailable


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "pad_token_id",
)


@torch.no_grad()
def test_counts(bridge: TransformerBridge, make_inputs: Callable[..., Inputs]) -> None:
    names = ["blocks.0.attn.hook_pattern", "blocks.2.hook_resid_post", "vision_encoder.hook_out"]
    assert check_hooks(bridge, names, make_inputs()) == dict.fromkeys(names, 1)
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("blocks.0.attn.hook_patern", ValueError, "this bridge has no hook 'blocks.0.attn.hook_patern'"),
        ("blocks.3.attn.hook_pattern", ValueError, "has no hook"),
        ("vision_encoder.hook_patch_embed", ValueError, "cannot fire: nothing calls it; read vision_encoder.embed"),
        ("blocks.0.attn.hook_result", ValueError, r"cannot fire: call set_use_attn_result\(True\)"),
        ("blocks.0.hook_attn_in", ValueError, r"cannot fire: call set_use_attn_in\(True\)"),
        ("vision_projector.hook_out", RuntimeError, "never fired with inputs input_ids: vision_projector.hook_out$"),
    ],
)
def test_what_does_not_fire_is_refused(bridge: TransformerBridge, name: str, error: Any, message: str) -> None:
    """The last one could, with pictures."""
    names = ["blocks.0.hook_out", name]
    with pytest.raises(error, match=message):
        check_hooks(bridge, names, {"input_ids": torch.tensor([[5, 6, 7]])})
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())


@torch.no_grad()
def test_a_gated_hook_counts_once_it_is_let_through(
    bridge: TransformerBridge, make_inputs: Callable[..., Inputs]
) -> None:
    bridge.set_use_attn_result(True)
    assert check_hooks(bridge, ["blocks.0.attn.hook_result"], make_inputs()) == {"blocks.0.attn.hook_result": 1}
