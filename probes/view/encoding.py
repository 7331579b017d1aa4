"""Compact storage of attention in a page: 8 bits a value with a scale for each row, compressed."""

from __future__ import annotations

import base64
import gzip
from typing import Any

import numpy as np
from jaxtyping import Float

LEVELS = 255
SIGNED_LEVELS = 127


def encode_rows(values: Float[np.ndarray, "layers heads words patches"], signed: bool = False) -> dict[str, Any]:
    """Encode values in 8 bits, with a scale for each row of patches.

    A value differs from its stored form by at most half a step: the row's largest value / 510, or / 254 if signed.

    Args:
        values: Values by layer, head, word and patch; undefined ones are stored as 0.
        signed: Whether values may be negative.

    Returns:
        `shape`, `signed`, `scale` (float32, base64) and `values` (gzip, base64).

    Raises:
        ValueError: If a value is negative and `signed` is False.

    Example:
        >>> encoded = encode_rows(np.array([[[[0.0, 0.5]]]]))
        >>> decode_rows(encoded).round(2).tolist()
        [[[[0.0, 0.5]]]]
    """
    values = np.nan_to_num(np.asarray(values, dtype=np.float32))
    if not signed and (values < 0).any():
        raise ValueError(f"values: {float(values.min())} is negative; encode signed values with signed=True")
    scale = np.abs(values).max(-1, initial=0.0)
    steps = SIGNED_LEVELS if signed else LEVELS
    divisor = np.where(scale > 0, scale, 1.0)[..., None]
    levels = np.rint(values / divisor * steps) + (SIGNED_LEVELS + 1 if signed else 0)
    return {
        "shape": list(values.shape),
        "signed": signed,
        "scale": encode_floats(scale),
        "values": _compress(levels.astype(np.uint8).tobytes()),
    }


def decode_rows(encoded: dict[str, Any]) -> Float[np.ndarray, "layers heads words patches"]:
    """Return the values that `encode_rows` stored.

    Args:
        encoded: What it returned.
    """
    levels = np.frombuffer(gzip.decompress(base64.b64decode(encoded["values"])), np.uint8).astype(np.float32)
    scale = np.frombuffer(base64.b64decode(encoded["scale"]), "<f4")
    shape = tuple(encoded["shape"])
    offset, steps = (SIGNED_LEVELS + 1, SIGNED_LEVELS) if encoded["signed"] else (0, LEVELS)
    return (levels.reshape(shape) - offset) / steps * scale.reshape(*shape[:-1], 1)


def encode_floats(values: np.ndarray) -> str:
    """Return numbers as little-endian float32 in base64."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode()


def encode_indices(values: np.ndarray) -> str:
    """Return whole numbers below 65,536 as little-endian uint16, compressed, in base64.

    Raises:
        ValueError: If a number is negative or larger.
    """
    if (outside := values[(values < 0) | (values > 65_535)]).size:
        raise ValueError(f"values: {outside[0]} does not fit; indices must be 0 to 65535")
    return _compress(np.ascontiguousarray(values, dtype="<u2").tobytes())


def _compress(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, compresslevel=6, mtime=0)).decode()
