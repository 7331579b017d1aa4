"""Access to the decoder layers of a model, and the conventions of its attention masks and caches."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import (
    create_causal_mask,
    eager_mask,
    flash_attention_mask,
    flex_attention_mask,
    sdpa_mask,
)

from probes.unwrapping import require_model, unwrap_module

# The function that makes the mask determines how an attention implementation interprets it. A hub kernel registered
# under its own name, for example, takes the masks of flash attention.
MASK_FORMATS = {sdpa_mask: "sdpa", eager_mask: "eager", flash_attention_mask: "flash", flex_attention_mask: "flex"}
# Formats whose masks an intervention can edit: None or [batch, 1, queries, keys].
WRITABLE_MASK_FORMATS = ("sdpa", "eager")

# Keyword of the key-value cache in calls and outputs: `cache` from transformers 5.24 on, which accepts both names, and
# `past_key_values` before.
_CACHE_NAMES = ("cache", "past_key_values")
_DEFAULT_CACHE_NAME = next(name for name in _CACHE_NAMES if name in inspect.signature(create_causal_mask).parameters)


def mask_format(implementation: str | None) -> str | None:
    """Return the mask format of an attention implementation.

    Args:
        implementation: Name of the implementation, as in `config._attn_implementation`.

    Returns:
        "sdpa", "eager", "flash" or "flex"; None for an implementation with an unknown format, such as paged attention.

    Example:
        >>> mask_format("flash_attention_2")
        'flash'
    """
    return MASK_FORMATS.get(AttentionMaskInterface().get(implementation))


def find_decoder(
    model: PreTrainedModel, stack: str = "decoder", mask_formats: Collection[str] = WRITABLE_MASK_FORMATS
) -> PreTrainedModel:
    """Return a stack of decoder layers: a module with a `config` and with `layers`, some or all with a `self_attn`.

    Args:
        model: A decoder language model, or a model such as LLaVA that holds one; also in a wrapper that
            `unwrap_model` knows.
        stack: `tokens.stack`: "decoder" for the language model, "prefusion" for LLaVA-Mini's pre-fusion layers.
        mask_formats: Mask formats that the caller supports.

    Raises:
        ValueError: If this is no transformers model, the model has no such stack, or its attention uses another mask
            format.

    Example:
        >>> decoder = find_decoder(model)
        >>> decoder.config.num_hidden_layers
        6
    """
    model = require_model(model)
    decoder = _layer_stack(unwrap_module(model.get_decoder()))
    if stack == "prefusion":
        decoder = unwrap_module(getattr(model.base_model, "prefusion", None))
        if decoder is None:
            raise ValueError(
                f"{type(model).__name__} has no pre-fusion layers; build the token map with stack='decoder'"
            )
    elif stack != "decoder":
        raise ValueError(f"unknown stack {stack!r} of a token map; choose decoder or prefusion")
    if not hasattr(decoder, "layers") or not any(hasattr(layer, "self_attn") for layer in decoder_layers(decoder)):
        raise ValueError(f"{type(decoder).__name__} cannot be probed: it has no decoder layers with a self_attn")
    implementation = decoder.config._attn_implementation
    if mask_format(implementation) not in mask_formats:
        raise ValueError(f"attention implementation {implementation!r} cannot be probed; load the model with 'sdpa'")
    return decoder


def _layer_stack(decoder: nn.Module) -> Any:
    """Return the module with `layers` inside a causal language model, which Llama 4 and BLIP-2 name as the decoder."""
    while not hasattr(decoder, "layers") and isinstance(decoder, PreTrainedModel):
        # Llama 4's language model calls itself its decoder.
        inner = next((part for part in (decoder.get_decoder(), decoder.base_model) if part is not decoder), None)
        inner = getattr(decoder, "model", None) if inner is None else inner
        if inner is None:
            break
        decoder = inner
    return decoder


def cache_name(arguments: Mapping[str, Any]) -> str:
    """Return the keyword of the key-value cache.

    Args:
        arguments: Keyword arguments of a model or layer call, or the output of a model.

    Returns:
        The keyword that `arguments` contain, or the default of this transformers version if they contain none.
    """
    return next((name for name in _CACHE_NAMES if name in arguments), _DEFAULT_CACHE_NAME)


def decoder_layers(decoder: nn.Module) -> list[nn.Module]:
    """Return the layers of a stack without their wrappers, and no other modules that share their config.

    Example:
        >>> len(decoder_layers(find_decoder(model)))
        6
    """
    return [unwrap_module(layer) for layer in decoder.get_submodule("layers").children()]


def as_indices(name: str, given: Iterable[int]) -> list[int]:
    """Return indices, such as those of layers, as a list.

    Args:
        name: The parameter's name, for the error.
        given: What a user gave.

    Raises:
        TypeError: If it is not a list of integers. Booleans are none: as a mask of layers they would mean something else.

    Example:
        >>> as_indices("heads", torch.tensor([1, 0]))
        [1, 0]
    """
    if not isinstance(given, Iterable):
        raise TypeError(f"{name}: {given!r} is no list of integers; write [{given!r}]")
    numbers: list[Any] = [given] if isinstance(given, str) else list(given)
    if strangers := [number for number in numbers if not _is_integer(number)]:
        raise TypeError(f"{name}: {strangers[0]!r} is no integer; write integers, such as [0, 1]")
    return [operator.index(number) for number in numbers]


def _is_integer(number: Any) -> bool:
    """Return whether a number is an integer, also in a tensor or an array. A boolean is none."""
    if isinstance(number, bool | np.bool_) or getattr(number, "dtype", None) == torch.bool:
        return False
    try:
        operator.index(number)
    except TypeError:
        return False
    return True


def select_layers(decoder: nn.Module, layers: Iterable[int] | None) -> tuple[int, ...]:
    """Return layer indices in ascending order without duplicates.

    Args:
        decoder: A stack from `find_decoder`.
        layers: Layer indices from 0, or None for all layers.

    Raises:
        ValueError: If an index is outside the model.
        TypeError: If layers are not a list of indices.

    Example:
        >>> select_layers(find_decoder(model), [3, 1, 3])
        (1, 3)
    """
    count = len(decoder_layers(decoder))
    selected = tuple(sorted(set(range(count) if layers is None else as_indices("layers", layers))))
    outside = [layer for layer in selected if not 0 <= layer < count]
    if outside:
        raise ValueError(f"layers {outside} are outside the model; it has {count} layers, 0 to {count - 1}")
    return selected


def select_attention_layers(decoder: nn.Module, layers: Iterable[int] | None) -> tuple[int, ...]:
    """Return layer indices as `select_layers` does, of layers with softmax attention only.

    Args:
        decoder: A stack from `find_decoder`.
        layers: Layer indices from 0, or None for all layers that have a `self_attn`.

    Raises:
        ValueError: If an index is outside the model, or names a layer without a `self_attn`, as in hybrid models.

    Example:
        >>> select_attention_layers(find_decoder(model), None)
        (0, 1, 2, 3, 4, 5)
    """
    modules = decoder_layers(decoder)
    with_attention = tuple(number for number, layer in enumerate(modules) if hasattr(layer, "self_attn"))
    selected = with_attention if layers is None else select_layers(decoder, layers)
    if without := [layer for layer in selected if layer not in with_attention]:
        names = (
            ", ".join(
                dict.fromkeys(
                    name
                    for layer in without
                    for name, _ in modules[layer].named_children()
                    if "attn" in name or "mixer" in name
                )
            )
            or "no attention"
        )
        raise ValueError(
            f"layers {without} of {type(decoder).__name__} have {names}, no self_attn: "
            f"choose from the layers with softmax attention, {list(with_attention)}"
        )
    return selected
