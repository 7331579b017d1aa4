"""FLOPs and cache size of a forward pass, counted by torch as it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Cache, PreTrainedModel

from experiments.evaluation.questions import EncodedQuestions
from experiments.models.token_reduction import TokenDropper, keep_all_tokens
from probes.hooks.decoder import cache_name
from probes.tokens.token_map import visual_token_ids

Result = TypeVar("Result")


@torch.no_grad()
def forward_cost(
    model: PreTrainedModel, questions: EncodedQuestions, drop_tokens: TokenDropper = keep_all_tokens
) -> dict[str, Any]:
    """Measure the cost of the prefill of one question.

    FLOPs cover the vision tower, projector, compressor, pre-fusion and language model. Visual tokens that are dropped
    before the last layer get no logits.

    Args:
        model: The model.
        questions: The first question is measured, alone.
        drop_tokens: Drops visual tokens in the forward call.

    Returns:
        The `cost` part of a record: FLOPs, bytes of the key-value cache, and numbers of tokens.
    """
    inputs = {name: tensor for name, tensor in questions.first().items() if name != "labels"}
    # Counted from ids: a TokenMap rejects prompts without visual tokens, such as those of a LLaVA-Mini of size 0.
    visual = sum(int((inputs["input_ids"] == token).sum()) for token in visual_token_ids(model.config))
    with drop_tokens(model, inputs) as receipt:
        logits_to_keep: dict[str, Any] = {}
        if receipt is not None:
            model(**inputs)  # which tokens reach the last layer is known only after a run
            dropped_at_end = cast(Tensor, receipt[-1].chosen)[0]
            logits_to_keep["logits_to_keep"] = (~dropped_at_end).nonzero()[:, 0].to(model.device)
        with _frozen(model):
            flops, outputs = count_flops(lambda: model(**inputs, **logits_to_keep, use_cache=True))
    dropped_tokens = 0.0  # summed over layers
    for effect in receipt or ():
        dropped_tokens += sum(effect.tokens[layer] / effect.calls[layer] for layer in effect.calls)
    return {
        "flops": float(flops),
        "cache_bytes": kv_cache_bytes(_cache(outputs)),
        "text_tokens": inputs["input_ids"].shape[1] - visual,
        "visual_tokens": visual,
        "visual_tokens_mean": visual - dropped_tokens / model.config.get_text_config().num_hidden_layers,
        "convention": "multiply and add are 2; one question with its answer, all matrix products and attention, counted by torch",
    }


@torch.no_grad()
def count_flops(run: Callable[[], Result]) -> tuple[int, Result]:
    """Run a function and count its FLOPs.

    Attention runs as plain matrix products, since torch counts nothing inside fused kernels on a CPU. Causal attention
    counts in full, as in torch.

    Returns:
        The FLOPs, and what `run` returned.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = run()
    return counter.get_total_flops(), result


def kv_cache_bytes(cache: Cache) -> int:
    """Return the bytes of the keys and values in a cache."""
    filled_layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in filled_layers)


def _cache(outputs: Any) -> Cache:
    """Return the cache in the outputs of a model; BLIP-2 returns the outputs of its language model among its own."""
    language_model_outputs = outputs.get("language_model_outputs", outputs)
    return cast(Cache, language_model_outputs[cache_name(language_model_outputs)])


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Make no parameter require gradients inside the block.

    torch's counter registers gradient hooks on a module's inputs, and fails without gradients if such an input is a
    view of a parameter, as the query tokens of BLIP-2 are.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
