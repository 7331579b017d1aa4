"""Build single compressors for a vision tower of 6 x 6 patches, with random inputs for them."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_mini import LlavaMiniConfig
from llava_mini.compressors import COMPRESSORS, Compressor
from tests.tiny_models import tiny_text_config, tiny_vision_config

SIDE, TEXT_WIDTH = 6, 24


def configure(name: str, size: int = 2, width: int = 32, **fields) -> LlavaMiniConfig:
    """Return a configuration with this compressor; `fields` as in `LlavaMiniConfig`."""
    return LlavaMiniConfig(
        vision_config=tiny_vision_config(hidden_size=width, image_size=6 * SIDE, patch_size=6),
        text_config=tiny_text_config(vocab_size=50, hidden_size=TEXT_WIDTH, num_hidden_layers=2, num_key_value_heads=4),
        compressor=name,
        compressor_size=size,
        **fields,
    )


def build(name: str, size: int = 2, width: int = 32, seed: int = 0, **fields) -> Compressor:
    """Return a compressor in evaluation mode, built with this seed."""
    torch.manual_seed(seed)
    return COMPRESSORS[name](configure(name, size, width, **fields)).eval()


def perturb_parameters(compressor: Compressor) -> Compressor:
    """Add noise to every parameter: the zero biases and unit norms of a fresh module would hide errors."""
    with torch.no_grad():
        for parameter in compressor.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return compressor


def random_inputs(compressor: Compressor, batch: int = 3) -> dict[str, Tensor]:
    """Return random features of `batch` images, and the other inputs that this compressor needs."""
    generator = torch.Generator().manual_seed(1)
    available = {
        "features": torch.randn(batch, SIDE**2, 32, generator=generator),
        "saliency": torch.randn(batch, SIDE**2, generator=generator).softmax(-1),
        "keys": torch.randn(batch, SIDE**2, 32, generator=generator),
        "projected": torch.randn(batch, SIDE**2, TEXT_WIDTH, generator=generator),
        "text": torch.randn(batch, 5, TEXT_WIDTH, generator=generator),
        "text_mask": torch.arange(5) <= torch.arange(batch)[:, None],
    }
    return {name: available[name] for name in ("features", *compressor.needs)}
