"""What a forward pass costs, counted by torch as it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Cache, PreTrainedModel

from experiments.evaluation import Questions
from probes.tokens import visual_token_ids

T = TypeVar("T")


def forward_cost(model: PreTrainedModel, questions: Questions) -> dict[str, Any]:
    """FLOPs of the prefill of the first question alone: tower, projector, compressor, pre-fusion and language model; and
    the bytes of keys and values that it leaves."""
    inputs = {name: tensor for name, tensor in questions.first().items() if name != "labels"}
    flops, outputs = counted(lambda: model(**inputs, use_cache=True))
    # not by a TokenMap, which refuses a prompt without visual tokens: a LLaVA-Mini of size 0 has none
    visual = sum(int((inputs["input_ids"] == token).sum()) for token in visual_token_ids(model.config))
    return {
        "flops": float(flops),
        "cache_bytes": cache_bytes(outputs.past_key_values),
        "text_tokens": inputs["input_ids"].shape[1] - visual,
        "visual_tokens": visual,
        "convention": "multiply and add are 2; one question with its answer, all matrix products and attention, counted by torch",
    }


@torch.no_grad()
def counted(run: Callable[[], T]) -> tuple[int, T]:
    """FLOPs of a run, and what it returned.

    Attention is run by its plain matrix products, since torch counts nothing inside fused kernels on a CPU; causal
    attention counts in full, as torch does.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        found = run()
    return counter.get_total_flops(), found


def cache_bytes(cache: Cache) -> int:
    """Of the keys and values that a language model's layers hold."""
    held = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in held)
