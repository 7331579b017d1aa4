"""TODO"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from transformers import (
    PreTrainedModel,
)


def choose_device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@contextlib.contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode without gradients."""
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        yield
    model.train(was_training)
