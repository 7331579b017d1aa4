"""The estimate from a configuration against what torch counts as the model itself runs, on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    Qwen3Config,
    SiglipVisionConfig,
)

from experiments.cost.architectures import geometry, mini
from experiments.cost.estimate import LINEAR, Geometry, Prompt

VISION = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
PIXELS = {"image_size": 32, "patch_size": 8}
TEXT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOWERS = {
    "clip": (CLIPVisionConfig(**VISION, **PIXELS), "default"),
    "siglip": (SiglipVisionConfig(**VISION, **PIXELS), "full"),
    "dinov2": (Dinov2Config(**VISION | {"intermediate_size": None}, mlp_ratio=2, **PIXELS), "default"),
}


def small(tower: str = "clip", text: Any = None) -> LlavaConfig:
    vision, strategy = TOWERS[tower]
    return LlavaConfig(
        vision_config=vision,
        text_config=text or LlamaConfig(**TEXT),
        vision_feature_select_strategy=strategy,
        image_token_index=95,
    )


@torch.no_grad()
def counted(config: LlavaConfig, visual: int, text: int, crops: int) -> tuple[float, float]:
    """FLOPs of one forward pass over one prompt: of linear maps, and of everything."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config).eval()
    inner = model.model
    side = config.vision_config.image_size
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        pixels = torch.empty(crops, 3, side, side)
        if config.model_type == "llava":
            inner.get_image_features(pixels)
        else:
            asked = torch.empty(1, text, config.text_config.hidden_size), torch.empty(1, text, dtype=torch.bool)
            patches, tokens = inner.encode(pixels[None], *asked)
            if inner.prefusion is not None:
                inner._prefuse(patches, tokens, torch.empty(1, text, config.text_config.hidden_size))
        model(inputs_embeds=torch.empty(1, visual + text, config.text_config.hidden_size))
    counts = counter.get_flop_counts()["Global"]
    return sum(v for k, v in counts.items() if k in LINEAR), sum(counts.values())


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("text", [LlamaConfig(**TEXT), Qwen3Config(**TEXT, head_dim=24)], ids=["llama", "qwen3"])
def test_llava_costs_what_torch_counts(tower: str, text: Any) -> None:
    config = small(tower, text)
    estimate = Geometry(config)(Prompt(text=11))
    assert estimate.visual_tokens == 16
    linear, everything = counted(config, visual=16, text=11, crops=1)
    assert estimate.flops("paper") == linear
    assert estimate.flops("full") == pytest.approx(everything, rel=0.005)


@pytest.mark.parametrize("compressor", ["none", "query", "average"])
@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("first", [True, False], ids=["compress first", "project first"])
@pytest.mark.parametrize("through", [True, False], ids=["tokens pre-fused", "text alone pre-fused"])
def test_llava_mini_costs_what_torch_counts(
    compressor: str, layers: int, tiles: int, first: bool, through: bool
) -> None:
    config = mini(
        small(),
        compressor=compressor,
        compressor_size=2,
        compressor_heads=4,
        prefusion_layers=layers,
        compress_before_projection=first,
        prefuse_visual_tokens=through,
    )
    estimate = Geometry(config)(Prompt(text=11, tiles=tiles))
    crops = 1 if tiles == 1 else 5
    linear, everything = counted(config, estimate.visual_tokens, 11, crops)
    assert estimate.visual_tokens == (16 * tiles**2 if compressor == "none" else 4)
    assert estimate.flops("paper") - estimate.prefusion.spared == linear
    assert (estimate.prefusion.spared > 0) == (layers > 0 and (compressor != "none" or not through))
    assert estimate.flops("full") == pytest.approx(everything, rel=0.005)


@pytest.mark.parametrize("tiles", [1, 2])
def test_without_visual_tokens_no_patch_is_read(tiles: int) -> None:
    """Fewer FLOPs than with one token, down to the last layer of pre-fusion."""
    none, one = (mini(small(), compressor_size=size, compressor_heads=4, prefusion_layers=2) for size in (0, 1))
    estimate, more = (Geometry(config)(Prompt(text=11, tiles=tiles)) for config in (none, one))
    linear, everything = counted(none, 0, 11, 1 if tiles == 1 else 5)
    assert estimate.visual_tokens == 0
    assert estimate.flops("paper") - estimate.prefusion.spared == linear
    assert estimate.flops("full") == pytest.approx(everything, rel=0.005)
    assert estimate.flops("full") < more.flops("full")


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("compressor", ["prumerge_plus", "visionzip", "llama_vid"])
@pytest.mark.parametrize("tiles", [1, 2])
def test_what_looks_at_the_tower_or_the_text_costs_what_torch_counts(tower: str, compressor: str, tiles: int) -> None:
    config = mini(small(tower), compressor=compressor, compressor_size=2, prefusion_layers=0)
    costs = Geometry(config)
    estimate = costs(Prompt(text=11, tiles=tiles))
    linear, everything = counted(config, estimate.visual_tokens, 11, 1 if tiles == 1 else 5)
    assert estimate.flops("paper") == linear
    assert estimate.flops("full") == pytest.approx(everything, rel=0.005)
    assert costs(Prompt(text=10.6, tiles=tiles)).compressor == estimate.compressor  # a mean of prompts
    assert (estimate.compressor.linear > 0) == (compressor == "llama_vid")
    plain = Geometry(mini(small(tower), compressor="average", compressor_size=2, prefusion_layers=0))
    more = estimate.tower.other - plain(Prompt(text=11, tiles=tiles)).tower.other
    queries, keys = (16, 16) if tower == "siglip" else (1, 17)
    assert more == (0 if compressor == "llama_vid" else 2 * queries * keys * 48 * (1 if tiles == 1 else 5))


@pytest.mark.parametrize(("name", "size", "layers"), [("llava-1.5-7b", 0, 0), ("llama-3.1-8b", 1, 4)])
def test_at_full_size_too(name: str, size: int, layers: int) -> None:
    config = geometry(name)
    if size:
        config = mini(config, compressor_size=size, prefusion_layers=layers)
    estimate = Geometry(config)(Prompt(text=60))
    linear, everything = counted(config, estimate.visual_tokens, 60, 1)
    assert estimate.flops("paper") - estimate.prefusion.spared == pytest.approx(linear, rel=1e-9)
    assert estimate.flops("full") == pytest.approx(everything, rel=0.005)


@torch.no_grad()
def test_a_decoded_token_and_its_cache() -> None:
    config = small()
    config.dtype = torch.float32
    estimate = Geometry(config)(Prompt(text=11))
    model = AutoModelForImageTextToText.from_config(config).eval()
    cache = model(inputs_embeds=torch.randn(1, 27, 64)).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert estimate.cache_bytes(4) == held
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.tensor([[3]]), past_key_values=cache)
    assert estimate.decode.flops("full") == pytest.approx(counter.get_total_flops(), rel=0.005)


def test_frames_repeat_all_but_the_language_model() -> None:
    one, ten = (Geometry(mini(small(), compressor_heads=4, prefusion_layers=1))(Prompt(11, frames=n)) for n in (1, 10))
    for part in ("tower", "projector", "compressor", "prefusion"):
        assert getattr(ten, part).flops("full") == 10 * getattr(one, part).flops("full")
    assert ten.prefill.linear == one.prefill.linear * 21 / 12
    assert ten.pixel_bytes() == 10 * 3 * 32 * 32 * 2


def test_tokens_dropped_on_the_way() -> None:
    whole = Geometry(small())
    dropped = whole(Prompt(4, visual_by_layer=[1, 0.5, 0]))
    assert dropped.prefill.linear == whole.layer_linear * (20 + 12 + 4)
    assert dropped.cache_bytes() == whole.cache_numbers * (20 + 12 + 4) * 2
    with pytest.raises(ValueError, match="visual_by_layer names 2 layers: the language model has 3"):
        whole(Prompt(4, visual_by_layer=[1, 0.5]))


def test_parameters_are_the_models() -> None:
    parts = Geometry(mini(small(), compressor_heads=4, prefusion_layers=1)).parameters()
    model = AutoModelForImageTextToText.from_config(mini(small(), compressor_heads=4, prefusion_layers=1))
    assert sum(parts.values()) == model.num_parameters()
    assert Geometry(geometry("smol")).parameters()["head"] == 0  # tied to the embeddings
