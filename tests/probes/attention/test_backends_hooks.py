"""`unavailable_hooks` and `check_hooks` against the hooks of a bridge that really fire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import LlavaForConditionalGeneration, Qwen3Config

from probes.attention.backends.transformer_lens import check_hooks, unavailable_hooks, wrap
from tests.tiny_models import PAD_TOKEN, tiny_llava_config, tiny_text_config

Inputs = dict[str, torch.Tensor]


@pytest.fixture
def bridge(make_llava: Callable[..., LlavaForConditionalGeneration]) -> TransformerBridge:
    return wrap(make_llava())


def hooks_that_fire(bridge: TransformerBridge, inputs: Inputs) -> set[str]:
    """Return the names of all hooks that fire, found without the bridge's own functions to add hooks."""
    fired: set[int] = set()
    for point in bridge.hook_dict.values():
        point.register_forward_hook(lambda point, args, output: fired.add(id(point)))
    bridge.original_model(**inputs)
    return {name for name, point in bridge.hook_dict.items() if id(point) in fired}


@torch.no_grad()
def test_unavailable_hooks_are_all_hooks_that_do_not_fire(
    bridge: TransformerBridge, make_inputs: Callable[..., Inputs]
) -> None:
    unavailable = unavailable_hooks(bridge)
    assert hooks_that_fire(bridge, make_inputs()) == bridge.hook_dict.keys() - unavailable.keys()
    assert "vision_projector.hook_out" in unavailable["vision_projector.hook_projected"]
    assert "blocks.0.attn.hook_q_normed" in unavailable
    assert unavailable["blocks.1.hook_mlp_in"] == "call set_use_hook_mlp_in(True) on the bridge first"


@torch.no_grad()
def test_unavailable_hooks_model_with_query_norms_omits_norm_hooks(
    make_llava: Callable[..., LlavaForConditionalGeneration], make_inputs: Callable[..., Inputs]
) -> None:
    vision = make_llava().config.vision_config
    text = tiny_text_config(Qwen3Config, pad_token_id=PAD_TOKEN, head_dim=8)
    config = tiny_llava_config(vision_config=vision, text_config=text)
    bridge = wrap(LlavaForConditionalGeneration(config).eval())
    unavailable = unavailable_hooks(bridge)
    assert hooks_that_fire(bridge, make_inputs()) == bridge.hook_dict.keys() - unavailable.keys()
    assert "blocks.0.attn.hook_q_normed" not in unavailable


@torch.no_grad()
def test_check_hooks_available_hooks_returns_counts(
    bridge: TransformerBridge, make_inputs: Callable[..., Inputs]
) -> None:
    names = ["blocks.0.attn.hook_pattern", "blocks.2.hook_resid_post", "vision_encoder.hook_out"]
    assert check_hooks(bridge, names, make_inputs()) == dict.fromkeys(names, 1)
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("blocks.0.attn.hook_patern", ValueError, "no hook 'blocks.0.attn.hook_patern'"),
        ("blocks.3.attn.hook_pattern", ValueError, "no hook 'blocks.3.attn.hook_pattern'"),
        (
            "vision_encoder.hook_patch_embed",
            ValueError,
            "'vision_encoder.hook_patch_embed' cannot fire: .*vision_encoder.embed",
        ),
        (
            "blocks.0.attn.hook_result",
            ValueError,
            r"'blocks.0.attn.hook_result' cannot fire: .*set_use_attn_result\(True\)",
        ),
        ("blocks.0.hook_attn_in", ValueError, r"'blocks.0.hook_attn_in' cannot fire: .*set_use_attn_in\(True\)"),
        (
            "vision_projector.hook_out",
            RuntimeError,
            "hooks vision_projector.hook_out never fired with inputs input_ids:",
        ),
    ],
)
def test_check_hooks_hook_that_does_not_fire_raises(
    bridge: TransformerBridge, name: str, error: Any, message: str
) -> None:
    """The last of these hooks would fire with images."""
    names = ["blocks.0.hook_out", name]
    with pytest.raises(error, match=message):
        check_hooks(bridge, names, {"input_ids": torch.tensor([[5, 6, 7]])})
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())


@torch.no_grad()
def test_check_hooks_gated_hook_counts_after_its_setter(
    bridge: TransformerBridge, make_inputs: Callable[..., Inputs]
) -> None:
    bridge.set_use_attn_result(True)
    assert check_hooks(bridge, ["blocks.0.attn.hook_result"], make_inputs()) == {"blocks.0.attn.hook_result": 1}
