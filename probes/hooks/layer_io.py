"""Hidden states and attention masks of decoder layer calls: read and replace."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from probes.hooks.decoder import cache_name, decoder_layers
from probes.hooks.partial_call import CallSubset

# Outputs of a decoder layer: of the whole layer (its residual stream), of its attention, and of its MLP.
COMPONENTS = ("residual", "attention", "mlp")


def component_module(layer: nn.Module, component: str) -> nn.Module:
    """Return the submodule of a decoder layer whose output is `component`.

    Args:
        layer: A decoder layer.
        component: One of COMPONENTS.

    Raises:
        ValueError: If the component is unknown or the layer lacks it.

    Example:
        >>> from probes.hooks.decoder import decoder_layers, find_decoder
        >>> type(component_module(decoder_layers(find_decoder(model))[0], "mlp")).__name__
        'LlamaMLP'
    """
    if component not in COMPONENTS:
        raise ValueError(f"unknown component {component!r}; choose {', '.join(COMPONENTS)}")
    if component == "residual" and hasattr(layer, "altup"):
        raise ValueError(f"{type(layer).__name__} has several residual streams (AltUp): choose attention or mlp")
    if component == "mlp" and getattr(layer, "enable_moe_block", False):
        raise ValueError(f"{type(layer).__name__} adds experts beside its mlp: choose residual or attention")
    names = {"residual": "", "attention": "self_attn", "mlp": "mlp"}
    try:
        return layer.get_submodule(names[component])
    except AttributeError:
        raise ValueError(f"{type(layer).__name__} has no {names[component]}, so its {component} is unknown") from None


def layer_after_added_features(decoder: nn.Module, number: int) -> nn.Module | None:
    """Return the layer after `number` if the decoder adds image features to the states between the two, else None.

    DeepStack (Meng et al. 2024, arXiv 2406.04334; Qwen3-VL) adds features to the visual tokens after the first layers.
    The residual stream is then the input of the next layer, not the output of this one.
    """
    layers = decoder_layers(decoder)
    return layers[number + 1] if hasattr(decoder, "_deepstack_process") and number + 1 < len(layers) else None


def input_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states that a decoder layer is called with."""
    return args[0] if args else kwargs["hidden_states"]


def output_states(output: Any) -> Tensor:
    """Return the hidden states in the output of a module.

    Layers return a tensor; attention returns a tuple whose first item is the tensor.
    """
    return output[0] if isinstance(output, tuple) else output


def replace_input_states(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a layer call with other hidden states."""
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def replace_output_states(output: Any, hidden: Tensor) -> Any:
    """Return the output of a module with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def key_length(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the number of keys in the attention of a layer call, with cached keys and empty static cache slots.

    Raises:
        ValueError: If the mask is not [batch, 1, queries, keys], as for flash and flex attention, or is a bool mask under
            eager attention, which would add it to the scores as 0 and 1.
    """
    mask, query_count = kwargs["attention_mask"], input_states(args, kwargs).shape[-2]
    attention = layer.get_submodule("self_attn")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[1] != 1:
            shape = list(getattr(mask, "shape", []))
            advice = "pass one mask for all heads" if len(shape) == 4 and shape[1] > 1 else "load the model with 'sdpa'"
            raise ValueError(
                f"the attention mask of {type(layer).__name__} is a {type(mask).__name__} {shape}, not "
                f"[batch, 1, queries, keys]; {advice} to intervene"
            )
        if mask.dtype == torch.bool and _is_eager(attention):
            raise ValueError(
                f"eager attention of {type(layer).__name__} adds its mask to the scores, a torch.bool one as 0 and 1: "
                "pass an additive mask, or load the model with 'sdpa'"
            )
        return mask.shape[-1]
    if getattr(attention, "is_kv_shared_layer", False):  # Gemma 3n and 4: its keys are those of an earlier layer
        return int(kwargs["shared_kv_states"][attention.layer_type][0].shape[-2])
    if (cache := kwargs.get(cache_name(kwargs))) is not None:
        key_count, _ = cache.get_mask_sizes(query_count, attention.layer_idx)
        return int(key_count)
    return query_count


def _is_eager(attention: nn.Module) -> bool:
    return getattr(getattr(attention, "config", None), "_attn_implementation", None) == "eager"


def materialize_mask(layer: nn.Module, mask: Tensor | None, hidden: Tensor, key_count: int) -> Tensor:
    """Return the attention mask of a layer call as a tensor.

    Args:
        layer: The decoder layer.
        mask: Its mask, or None, which SDPA interprets as causal from the first key on; a single query attends to all.
        hidden: Its hidden states `[..., queries, width]`.
        key_count: Number of keys.

    Returns:
        `mask` unchanged, or the equivalent additive mask `[1, 1, queries, keys]` of None. It is additive because eager
        attention would add a bool mask as 0 and 1.
    """
    if mask is not None:
        return mask
    query_count = hidden.shape[-2]
    blocked = torch.ones(1, 1, query_count, key_count, dtype=torch.bool, device=hidden.device)
    causal = query_count > 1 and getattr(layer.get_submodule("self_attn"), "is_causal", True)
    blocked = blocked.triu(1) if causal else ~blocked
    return block_edges(torch.zeros(blocked.shape, dtype=hidden.dtype, device=hidden.device), blocked)


def visible_edges(mask: Tensor) -> Bool[Tensor, "batch 1 queries keys"]:
    """Return which attention edges (query, key) a bool or additive mask allows."""
    # Blocked keys have the minimum of the mask's type or -inf; no additive bias is close to half of it.
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def block_edges(mask: Tensor, blocked: Bool[Tensor, "batch 1 queries keys"]) -> Tensor:
    """Return `mask`, in its own bool or additive form, with the `blocked` edges removed.

    An additive mask gets the minimum of its type there. With -inf, a query whose keys are all blocked would be NaN.
    """
    if mask.dtype == torch.bool:
        return mask & ~blocked
    return mask.masked_fill(blocked, torch.finfo(mask.dtype).min)


def subset_arguments(subset: CallSubset, mask: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the mask, position embeddings and position ids of a layer call on a subset of its tokens.

    Args:
        subset: Queries and keys that remain.
        mask: Attention mask of the whole call.
        kwargs: Keyword arguments of the whole call.
    """
    arguments: dict[str, Any] = {
        "attention_mask": (
            None
            if mask is None
            else block_edges(subset.select_edges(mask), subset.to(mask.device).key_filler[:, None, None, :])
        ),
        "position_embeddings": _select_embeddings(subset, kwargs["position_embeddings"]),
    }
    if isinstance(kwargs.get("position_ids"), Tensor):
        arguments["position_ids"] = subset.select_queries(kwargs["position_ids"], -1)
    return arguments


def _select_embeddings(subset: CallSubset, embeddings: Any) -> Any:
    """Return the position embeddings of the remaining queries: cosine and sine, or Llama 4's complex rotations."""
    if isinstance(embeddings, Tensor):
        return subset.select_queries(embeddings, -2)
    return tuple(subset.select_queries(part, -2) for part in embeddings)
