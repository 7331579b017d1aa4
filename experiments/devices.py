"""The device that models run on, and running them without gradients."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from experiments.errors import MissingDeviceError

if TYPE_CHECKING:  # importing transformers takes seconds, and the parent of a sweep's workers asks for the device alone
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def select_device(name: str) -> torch.device:
    """Return the device of a name. "auto" is the first that exists of CUDA, MPS and CPU.

    Raises:
        MissingDeviceError: If the name is not one of torch's, or this machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise MissingDeviceError(f"device: unknown '{name}'; use auto, cpu, cuda, cuda:1 or mps") from None
    available = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    count = available.get(device.type, 0)
    if (device.index or 0) >= count:
        use = "auto, cpu" + "".join(f", {kind}" for kind in ("cuda", "mps") if available[kind])
        raise MissingDeviceError(f"device: this machine has no '{name}'; use {use}")
    return device


def warn_if_bfloat16_is_slow(device: torch.device) -> None:
    """Warn where bfloat16 takes longer than float32: on x86 CPUs without units for it, by a factor of 6 to 8 (measured).

    Args:
        device: The device that is to compute in bfloat16.
    """
    if device.type != "cpu":
        return
    found = torch.cpu.get_capabilities()
    if found.get("architecture") == "x86_64" and not (found.get("avx512_bf16") or found.get("amx_bf16")):
        log.warning(
            "model.dtype, train.bf16: this CPU has no bfloat16 units, so float32 is several times faster; "
            "set model.dtype=float32 train.bf16=false"
        )


@contextlib.contextmanager
def inference_mode(model: PreTrainedModel) -> Iterator[None]:
    """Put the model into eval mode and compute no gradients, inside the block."""
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        yield
    model.train(was_training)
