"""Chunks of frames are sized by the bytes of their widest activations, and change no result."""

from __future__ import annotations

import pytest
import torch

from llava_mini import LlavaMiniConfig
from llava_mini.chunk_size import CPU_BYTES, DEVICE_BYTES, MOST_FRAMES, choose_chunk_size, choose_encoded_chunk_size
from tests.tiny_models import tiny_llava_config, tiny_text_config, tiny_vision_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def config(vision_width: int = 1024, text_width: int = 512, **fields: int) -> LlavaMiniConfig:
    """Return a configuration with 16 x 16 patches and these widths inside the MLPs."""
    return tiny_llava_config(
        LlavaMiniConfig,
        vision_config=tiny_vision_config(image_size=64, intermediate_size=vision_width),
        text_config=tiny_text_config(intermediate_size=text_width),
        **fields,
    )


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize(("tiles", "crops"), [(1, 1), (2, 5)])
@pytest.mark.parametrize(("vision_width", "text_width"), [(30_000, 10), (10, 30_000)])
def test_choose_chunk_size_fills_the_budget(
    device: torch.device, tiles: int, crops: int, vision_width: int, text_width: int
) -> None:
    size = choose_chunk_size(config(vision_width, text_width), [1, tiles], 60, device, torch.float32)
    positions = 257 * crops + (60 if text_width > vision_width else 0)
    frame_bytes = positions * 30_000 * 4
    budget = CPU_BYTES if device == CPU else DEVICE_BYTES
    assert 1 <= size <= MOST_FRAMES
    assert size == 1 or (size - 0.5) * frame_bytes <= budget
    assert size == MOST_FRAMES or (size + 0.5) * frame_bytes >= budget


def test_choose_chunk_size_without_prefusion_ignores_the_language_model() -> None:
    wide = config(1024, 10**6, prefusion_layers=0)
    assert choose_chunk_size(wide, [1], 60, CPU, torch.float32) == 8


def test_choose_chunk_size_given_in_the_configuration_is_that() -> None:
    given = config(frames_per_chunk=7)
    assert choose_chunk_size(given, [1], 60, CPU, torch.float32) == 7
    assert choose_encoded_chunk_size(given, 1e12, 60, torch.float32) == 7


@pytest.mark.parametrize(("encoded_bytes", "expected"), [(2**40, 1), (2**29 / 4.5, 4), (1, MOST_FRAMES)])
def test_choose_encoded_chunk_size_bounds_the_copied_bytes(encoded_bytes: float, expected: int) -> None:
    assert choose_encoded_chunk_size(config(), encoded_bytes, 60, torch.float32) == expected


@pytest.mark.parametrize("frames", [0, -1, 1.5])
def test_frames_per_chunk_out_of_range_raises(frames: float) -> None:
    with pytest.raises(ValueError, match=rf"frames_per_chunk.*{frames}"):
        config(frames_per_chunk=frames)  # type: ignore[arg-type]
