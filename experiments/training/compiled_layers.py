"""Compilation of the language model's layers while it trains."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel


@contextlib.contextmanager
def compile_decoder_layers(model: PreTrainedModel) -> Iterator[None]:
    """Run the decoder layers of a model compiled by torch.compile inside the block, and as before after it.

    All layers share one graph, so that the first step takes a minute and not one for each layer. Its shapes are symbolic:
    batches differ in length. A key-value cache would need a graph for each layer; call the model with `use_cache=False`.

    Args:
        model: A model with a language model whose decoder has `layers`.

    Raises:
        FileNotFoundError: If there is no C++ compiler, which torch.compile needs.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise FileNotFoundError(
            f"train.torch_compile: no C++ compiler '{compiler}' was found; install it, name another in CXX, or use false"
        )
    layers = list(model.get_decoder().layers)
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # that of the class shows again
