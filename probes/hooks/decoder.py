"""Finds a stack of decoder layers inside a model and follows which positions its forward calls cover."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn
from transformers import AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import (
    create_causal_mask,
    eager_mask,
    flash_attention_mask,
    flex_attention_mask,
    sdpa_mask,
)

# What an attention implementation does with its mask follows from the function that makes the mask: a kernel from the
# hub that is registered under a name of its own takes the masks of flash attention.
FAMILIES = {sdpa_mask: "sdpa", eager_mask: "eager", flash_attention_mask: "flash", flex_attention_mask: "flex"}


# Families whose masks can be written too: none, or [batch, 1, queries, keys].
WRITABLE = ("sdpa", "eager")


# What transformers calls keys and values in calls and outputs: from 5.24 on, where both are taken, and before.
_CACHE_NAMES = ("cache", "past_key_values")


_CACHE = next(name for name in _CACHE_NAMES if name in inspect.signature(create_causal_mask).parameters)


def attention_family(implementation: str | None) -> str | None:
    """sdpa, eager, flash or flex; None for an implementation whose masks are not known, such as paged attention."""
    return FAMILIES.get(AttentionMaskInterface().get(implementation))


def find_decoder(
    model: PreTrainedModel, stack: str = "decoder", families: Collection[str] = WRITABLE
) -> PreTrainedModel:
    """A stack of decoder layers: a module with `layers`, each with a `self_attn`, and with a `config`.

    Args:
        model: A decoder language model, or a wrapper such as LLaVA that holds one.
        stack: `tokens.stack`: "decoder" for the language model itself, "prefusion" for LLaVA-Mini's pre-fusion.
        families: Attention that the caller can deal with.

    Raises ValueError when there is no such stack, or it runs another attention.
    """
    decoder = model.get_decoder()
    if stack == "prefusion":
        decoder = getattr(model.base_model, "prefusion", None)
        if decoder is None:
            raise ValueError(f"{type(model).__name__} has no pre-fusion layers, which this token map is of")
    elif stack != "decoder":
        raise ValueError(f"unknown stack {stack!r} of a token map: there are decoder, prefusion")
    if not hasattr(decoder, "layers") or not all(hasattr(layer, "self_attn") for layer in decoder_layers(decoder)):
        raise ValueError(f"{type(decoder).__name__} has no decoder layers with a self_attn each: it cannot be probed")
    implementation = decoder.config._attn_implementation
    if attention_family(implementation) not in families:
        raise ValueError(f"attention implementation {implementation!r} cannot be probed: load the model with 'sdpa'")
    return decoder


def cache_name(named: Mapping[str, Any]) -> str:
    """What keys and values go by in the keywords of a model's or a layer's call, or in a model's output; where there are
    none, what they would go by."""
    return next((name for name in _CACHE_NAMES if name in named), _CACHE)


def decoder_layers(decoder: nn.Module) -> list[nn.Module]:
    """The stack's own layers: the one place to take them from, whatever else in a model shares their config."""
    return list(decoder.get_submodule("layers").children())


def select_layers(decoder: nn.Module, layers: Iterable[int] | None) -> tuple[int, ...]:
    """`layers` in ascending order without doubles, or all of the stack's. Raises ValueError outside the model."""
    count = len(decoder_layers(decoder))
    selected = tuple(sorted(set(range(count) if layers is None else layers)))
    outside = [layer for layer in selected if not 0 <= layer < count]
    if outside:
        raise ValueError(f"layers {outside} are outside the model: it has {count} layers, 0 to {count - 1}")
    return selected
