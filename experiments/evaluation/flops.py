"""What a forward pass costs, counted by torch as it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Cache, PreTrainedModel

from experiments.evaluation.questions import Questions
from experiments.models.token_reduction import Around, untouched
from probes.hooks.decoder import cache_name
from probes.tokens.token_map import visual_token_ids

T = TypeVar("T")


@torch.no_grad()
def forward_cost(model: PreTrainedModel, questions: Questions, around: Around = untouched) -> dict[str, Any]:
    """FLOPs of the prefill of the first question alone, with `around` around it: tower, projector, compressor,
    pre-fusion and language model; and the bytes of keys and values that it leaves. Visual tokens that are gone in the
    last layer get no logits."""
    inputs = {name: tensor for name, tensor in questions.first().items() if name != "labels"}
    # not by a TokenMap, which refuses a prompt without visual tokens: a LLaVA-Mini of size 0 has none
    visual = sum(int((inputs["input_ids"] == token).sum()) for token in visual_token_ids(model.config))
    with around(model, inputs) as receipt:
        left: dict[str, Any] = {}
        if receipt is not None:
            model(**inputs)  # only a run tells which tokens are left in the end
            left["logits_to_keep"] = (~cast(Tensor, receipt[-1].chosen)[0]).nonzero()[:, 0].to(model.device)
        flops, outputs = counted(lambda: model(**inputs, **left, use_cache=True))
    dropped = 0.0
    for effect in receipt or ():
        dropped += sum(effect.tokens[layer] / effect.calls[layer] for layer in effect.calls)
    return {
        "flops": float(flops),
        "cache_bytes": cache_bytes(outputs[cache_name(outputs)]),
        "text_tokens": inputs["input_ids"].shape[1] - visual,
        "visual_tokens": visual,
        "visual_tokens_mean": visual - dropped / model.config.get_text_config().num_hidden_layers,
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
