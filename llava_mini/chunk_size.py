"""Number of frames that pass through vision tower, compressor and pre-fusion at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .visual_layout import crops_per_frame

if TYPE_CHECKING:
    from .configuration import LlavaMiniConfig

# Bytes of the widest activations of a chunk. On a CPU they should stay in its last-level cache: at 257 positions of
# width 4,096, two frames take 0.92 of the time of sixteen. Other devices are limited by their memory.
CPU_BYTES = 2**23
DEVICE_BYTES = 2**29
# More frames gain no speed.
MOST_FRAMES = 32


def choose_chunk_size(
    config: LlavaMiniConfig, frame_tiles: Sequence[int], text_length: int, device: torch.device, dtype: torch.dtype
) -> int:
    """Return the number of frames of a chunk: `config.frames_per_chunk`, or as many as fit in memory.

    The widest activations are those inside the MLP of a vision tower's layer or of a pre-fusion layer.

    Args:
        config: Configuration of the model.
        frame_tiles: Tiles along a side of each frame.
        text_length: Text tokens that are fused with each frame.
        device: Device of the activations.
        dtype: Their dtype.

    Returns:
        From 1 to MOST_FRAMES. It changes no result.

    Example:
        >>> from llava_mini.chunk_size import choose_chunk_size
        >>> choose_chunk_size(mini.config, [1, 1], 60, torch.device("cpu"), torch.float32) > 1
        True
    """
    if config.frames_per_chunk is not None:
        return config.frames_per_chunk
    vision: Any = config.vision_config
    text: Any = config.get_text_config()
    side = config.encoded_side or vision.image_size // vision.patch_size
    positions = crops_per_frame(max(frame_tiles, default=1)) * (side**2 + 1)
    widest: int = positions * _mlp_width(vision)
    if config.prefusion_layers:
        widest = max(widest, (positions + text_length) * _mlp_width(text))
    budget = CPU_BYTES if device.type == "cpu" else DEVICE_BYTES
    # Round to the nearest, as the class token makes two frames of CLIP-L with 256 patches slightly too large.
    return min(max(round(budget / (widest * dtype.itemsize)), 1), MOST_FRAMES)


def choose_encoded_chunk_size(
    config: LlavaMiniConfig, encoded_bytes: float, text_length: int, dtype: torch.dtype
) -> int:
    """Return the number of encoded frames whose text is fused at once: `frames_per_chunk`, or as many as fit in memory.

    Args:
        config: Configuration of the model.
        encoded_bytes: Bytes of a frame's keys, values and tokens, which are copied where a frame has several questions.
        text_length: Text tokens that are fused with each frame.
        dtype: Dtype of the activations.

    Returns:
        From 1 to MOST_FRAMES. It changes no result.

    Example:
        >>> from llava_mini.chunk_size import choose_encoded_chunk_size
        >>> choose_encoded_chunk_size(mini.config, 1e6, 60, torch.float32)
        32
    """
    if config.frames_per_chunk is not None:
        return config.frames_per_chunk
    text_bytes = text_length * _mlp_width(config.get_text_config()) * dtype.itemsize
    return min(max(int(DEVICE_BYTES / (encoded_bytes + text_bytes)), 1), MOST_FRAMES)


def _mlp_width(config: Any) -> int:
    """Return the width inside an MLP. DINOv2 has a ratio instead, and some language models a width for each layer."""
    width = getattr(config, "intermediate_size", None) or config.hidden_size * getattr(config, "mlp_ratio", 4)
    return int(max(width) if isinstance(width, (list, tuple)) else width)


__all__ = ["MOST_FRAMES", "choose_chunk_size", "choose_encoded_chunk_size"]
