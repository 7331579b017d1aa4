"""Test cost estimates against torch's FLOP counter on the running model, on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageTextToText,
    Dinov2Config,
    LlavaConfig,
    Qwen3Config,
    SiglipVisionConfig,
)

from experiments.cost.architectures import llava_config, llava_mini_config
from experiments.cost.estimate import LINEAR_OPERATIONS, CostEstimate, CostModel, Prompt
from tests.tiny_models import tiny_llava_config, tiny_text_config, tiny_vision_config

# All widths are different, so that a count with the width of another part fails
VISION = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
PIXELS = {"image_size": 32, "patch_size": 8}
TEXT = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 112}
VISION_TOWERS = {
    "clip": (tiny_vision_config(**VISION, **PIXELS), "default"),
    "siglip": (tiny_vision_config(SiglipVisionConfig, **VISION, **PIXELS), "full"),
    "dinov2": (
        tiny_vision_config(Dinov2Config, **VISION | {"intermediate_size": None}, mlp_ratio=2, **PIXELS),
        "default",
    ),
}


def small_llava(tower: str = "clip", text: Any = None) -> LlavaConfig:
    """Return a small_llava LLaVA with this vision tower and language model."""
    vision, strategy = VISION_TOWERS[tower]
    return tiny_llava_config(
        vision_config=vision,
        text_config=text or tiny_text_config(**TEXT),
        vision_feature_select_strategy=strategy,
        image_token_id=95,
    )


@torch.no_grad()
def counted_flops(config: LlavaConfig, visual: int, text: int, crops: int) -> tuple[float, float]:
    """Return the FLOPs of one forward pass over one prompt: those of linear maps, and all of them."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config).eval()
    inner = model.model
    side = config.vision_config.image_size
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        pixels = torch.empty(crops, 3, side, side)
        if config.model_type == "llava":
            inner.get_image_features(pixels)
        else:
            question = torch.empty(1, text, config.text_config.hidden_size), torch.empty(1, text, dtype=torch.bool)
            patches, tokens = inner.encode(pixels[None], *question)
            if inner.prefusion is not None:
                inner._prefuse(patches, tokens, torch.empty(1, text, config.text_config.hidden_size))
        model(inputs_embeds=torch.empty(1, visual + text, config.text_config.hidden_size))
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for operation, flops in counts.items() if operation in LINEAR_OPERATIONS), sum(counts.values())


def skipped_linear(estimate: CostEstimate) -> float:
    """Return the linear FLOPs of the released code that this project does not run."""
    return estimate.tower.skipped_linear + estimate.prefusion.skipped_linear


@pytest.mark.parametrize("tower", VISION_TOWERS)
@pytest.mark.parametrize(
    "text", [tiny_text_config(**TEXT), tiny_text_config(Qwen3Config, **TEXT, head_dim=24)], ids=["llama", "qwen3"]
)
def test_estimate_of_llava_equals_torch_count(tower: str, text: Any) -> None:
    config = small_llava(tower, text)
    estimate = CostModel(config)(Prompt(text=11))
    assert estimate.visual_tokens == 16
    linear, total = counted_flops(config, visual=16, text=11, crops=1)
    assert estimate.flops("paper") == linear
    assert estimate.flops("full") == pytest.approx(total, rel=0.005)


@pytest.mark.parametrize("compressor", ["none", "query", "average"])
@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("compress_first", [True, False], ids=["compress first", "project first"])
@pytest.mark.parametrize("prefuse_tokens", [True, False], ids=["tokens pre-fused", "only text pre-fused"])
def test_estimate_of_llava_mini_equals_torch_count(
    compressor: str, layers: int, tiles: int, compress_first: bool, prefuse_tokens: bool
) -> None:
    config = llava_mini_config(
        small_llava(),
        compressor=compressor,
        compressor_size=2,
        compressor_heads=4,
        prefusion_layers=layers,
        compress_before_projection=compress_first,
        prefuse_visual_tokens=prefuse_tokens,
    )
    estimate = CostModel(config)(Prompt(text=11, tiles=tiles))
    crops = 1 if tiles == 1 else 5
    linear, total = counted_flops(config, estimate.visual_tokens, 11, crops)
    assert estimate.visual_tokens == (16 * tiles**2 if compressor == "none" else 4)
    assert estimate.flops("paper") - skipped_linear(estimate) == linear
    vision = config.vision_config
    layer_weights = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    assert estimate.tower.skipped_linear == 2 * layer_weights * 17 * crops  # the last layer: -2 is selected
    assert (estimate.prefusion.skipped_linear > 0) == (layers > 0 and (compressor != "none" or not prefuse_tokens))
    assert estimate.flops("full") == pytest.approx(total, rel=0.005)


@pytest.mark.parametrize("selected", [-1, -2, -3])
def test_estimate_of_models_that_share_a_vision_tower_counts_layers_of_each(selected: int) -> None:
    config = llava_mini_config(small_llava(), compressor_heads=4, prefusion_layers=1, vision_feature_layer=selected)
    vision = config.vision_config
    layer_weights = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    assert CostModel(config)(Prompt(text=11)).tower.skipped_linear == 2 * layer_weights * 17 * (-1 - selected)


@pytest.mark.parametrize("tiles", [1, 2])
def test_estimate_without_visual_tokens_skips_patches_in_last_prefusion_layer(tiles: int) -> None:
    """Without visual tokens there are fewer FLOPs than with one."""
    none, one = (
        llava_mini_config(small_llava(), compressor_size=size, compressor_heads=4, prefusion_layers=2)
        for size in (0, 1)
    )
    estimate, more = (CostModel(config)(Prompt(text=11, tiles=tiles)) for config in (none, one))
    linear, total = counted_flops(none, 0, 11, 1 if tiles == 1 else 5)
    assert estimate.visual_tokens == 0
    assert estimate.flops("paper") - skipped_linear(estimate) == linear
    assert estimate.flops("full") == pytest.approx(total, rel=0.005)
    assert estimate.flops("full") < more.flops("full")


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("compressor", ["prumerge_plus", "visionzip", "llama_vid"])
@pytest.mark.parametrize("tiles", [1, 2])
def test_estimate_of_compressor_with_needs_equals_torch_count(tower: str, compressor: str, tiles: int) -> None:
    config = llava_mini_config(small_llava(tower), compressor=compressor, compressor_size=2, prefusion_layers=0)
    cost_model = CostModel(config)
    estimate = cost_model(Prompt(text=11, tiles=tiles))
    linear, total = counted_flops(config, estimate.visual_tokens, 11, 1 if tiles == 1 else 5)
    assert estimate.flops("paper") - skipped_linear(estimate) == linear
    assert estimate.flops("full") == pytest.approx(total, rel=0.005)
    assert (
        cost_model(Prompt(text=10.6, tiles=tiles)).compressor == estimate.compressor
    )  # text may be the mean of several prompts
    assert (estimate.compressor.linear > 0) == (compressor == "llama_vid")
    plain = CostModel(
        llava_mini_config(small_llava(tower), compressor="average", compressor_size=2, prefusion_layers=0)
    )
    saliency_flops = estimate.tower.other - plain(Prompt(text=11, tiles=tiles)).tower.other
    queries, keys = (16, 16) if tower == "siglip" else (1, 17)
    assert saliency_flops == (0 if compressor == "llama_vid" else 2 * queries * keys * 48 * (1 if tiles == 1 else 5))


@pytest.mark.parametrize(("name", "size", "layers"), [("llava-1.5-7b", 0, 0), ("llama-3.1-8b", 1, 4)])
def test_estimate_of_full_size_model_equals_torch_count(name: str, size: int, layers: int) -> None:
    config = llava_config(name)
    if size:
        config = llava_mini_config(config, compressor_size=size, prefusion_layers=layers)
    estimate = CostModel(config)(Prompt(text=60))
    linear, total = counted_flops(config, estimate.visual_tokens, 60, 1)
    assert estimate.flops("paper") - skipped_linear(estimate) == pytest.approx(linear, rel=1e-9)
    assert estimate.flops("full") == pytest.approx(total, rel=0.005)


@torch.no_grad()
def test_estimate_of_decode_and_cache_equals_running_model() -> None:
    config = small_llava()
    config.dtype = torch.float32
    estimate = CostModel(config)(Prompt(text=11))
    model = AutoModelForImageTextToText.from_config(config).eval()
    cache = model(inputs_embeds=torch.randn(1, 27, 64)).past_key_values
    cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert estimate.cache_bytes(4) == cache_bytes
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.tensor([[3]]), past_key_values=cache)
    assert estimate.decode.flops("full") == pytest.approx(counter.get_total_flops(), rel=0.005)


def test_estimate_of_ten_frames_multiplies_all_but_language_model() -> None:
    one, ten = (
        CostModel(llava_mini_config(small_llava(), compressor_heads=4, prefusion_layers=1))(Prompt(11, frames=n))
        for n in (1, 10)
    )
    for part in ("tower", "projector", "compressor", "prefusion"):
        assert getattr(ten, part).flops("full") == 10 * getattr(one, part).flops("full")
    assert ten.prefill.linear == one.prefill.linear * 21 / 12
    assert ten.pixel_bytes() == 10 * 3 * 32 * 32 * 2


def test_estimate_with_dropped_tokens_counts_remaining_tokens() -> None:
    cost_model = CostModel(small_llava())
    dropped = cost_model(Prompt(4, visual_by_layer=[1, 0.5, 0]))
    assert dropped.prefill.linear == cost_model.linear_flops_per_token * (20 + 12 + 4)
    assert dropped.cache_bytes() == cost_model.cache_values_per_token * (20 + 12 + 4) * 2
    with pytest.raises(ValueError, match=r"visual_by_layer names 2 layers.*3"):
        cost_model(Prompt(4, visual_by_layer=[1, 0.5]))


def test_parameter_counts_sum_to_model_parameters() -> None:
    parts = CostModel(llava_mini_config(small_llava(), compressor_heads=4, prefusion_layers=1)).parameter_counts()
    model = AutoModelForImageTextToText.from_config(
        llava_mini_config(small_llava(), compressor_heads=4, prefusion_layers=1)
    )
    assert sum(parts.values()) == model.num_parameters()
    assert CostModel(llava_config("smol")).parameter_counts()["head"] == 0  # tied to the embeddings
