"""What a forward pass costs, counted by torch as it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Cache, PreTrainedModel

from experiments.evaluation import Questions
from probes import TokenMap


def forward_cost(model: PreTrainedModel, questions: Questions) -> dict[str, Any]:
    """FLOPs of the prefill of the first question alone: tower, projector, compressor, pre-fusion and language model; and
    the bytes of keys and values that it leaves.

    Attention is run by its plain matrix products, since torch counts nothing inside fused kernels on a CPU; causal
    attention counts in full, as torch does.
    """
    inputs = {name: tensor for name, tensor in questions.first().items() if name != "labels"}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        outputs = model(**inputs, use_cache=True)
    visual = int(TokenMap.from_inputs(model, inputs).mask("vision").sum())
    return {
        "flops": float(counter.get_total_flops()),
        "cache_bytes": cache_bytes(outputs.past_key_values),
        "text_tokens": inputs["input_ids"].shape[1] - visual,
        "visual_tokens": visual,
        "convention": "multiply and add are 2; one question with its answer, all matrix products and attention, counted by torch",
    }


def cache_bytes(cache: Cache) -> int:
    """Of the keys and values that a language model's layers hold."""
    held = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in held)
