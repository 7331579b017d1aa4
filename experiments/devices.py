"""The device that models run on, and running them without gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel


def select_device(name: str) -> torch.device:
    """Return the device of a name. "auto" is the first that exists of CUDA, MPS and CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@contextlib.contextmanager
def inference_mode(model: PreTrainedModel) -> Iterator[None]:
    """Put the model into eval mode and compute no gradients, inside the block."""
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        yield
    model.train(was_training)
