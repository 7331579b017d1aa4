"""Reads and writes what a decoder layer is called with: its hidden states and its attention mask."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from probes.hooks.decoder import cache_name
from probes.hooks.partial_call import Cut


def replace_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments with other hidden states."""
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """A module's output with other hidden states: the whole of it, or the first of a tuple."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def key_length(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many keys the layer's attention will have, cached ones and empty slots of a static cache included.

    Raises ValueError for a mask that is not [batch, 1, queries, keys]: flash and flex attention have others.
    """
    mask, queries = kwargs["attention_mask"], hidden_states(args, kwargs).shape[1]
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            shape = list(getattr(mask, "shape", []))
            raise ValueError(
                f"{type(layer).__name__} got a {type(mask).__name__} {shape} for a mask, not [batch, 1, queries, keys]:"
                " load the model with 'sdpa' to intervene"
            )
        return mask.shape[-1]
    if (cache := kwargs.get(cache_name(kwargs))) is not None:
        keys, _ = cache.get_mask_sizes(queries, layer.get_submodule("self_attn").layer_idx)
        return int(keys)
    return queries


def explicit(layer: nn.Module, mask: Tensor | None, hidden: Tensor, keys: int) -> Tensor:
    """`mask`, or in additive form what its absence means to sdpa: causal from the first key on; a single query sees all.

    Additive, since eager attention would add a bool mask as 0 and 1.
    """
    if mask is not None:
        return mask
    queries = hidden.shape[1]
    hidden_keys = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=hidden.device)
    causal = queries > 1 and getattr(layer.get_submodule("self_attn"), "is_causal", True)
    hidden_keys = hidden_keys.triu(1) if causal else ~hidden_keys
    return hide(torch.zeros(hidden_keys.shape, dtype=hidden.dtype, device=hidden.device), hidden_keys)


def visible(mask: Tensor) -> Bool[Tensor, "batch 1 queries keys"]:
    """Which keys a bool or an additive mask lets through."""
    # Hidden keys carry the least number of the mask's type or -inf; no bias is anywhere near them.
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def hide(mask: Tensor, blocked: Bool[Tensor, "batch 1 queries keys"]) -> Tensor:
    """`mask` without the `blocked` edges, of its own type: bool, or additive with the least number there.

    The least number rather than -inf: a row with every key blocked stays finite.
    """
    if mask.dtype == torch.bool:
        return mask & ~blocked
    return mask.masked_fill(blocked, torch.finfo(mask.dtype).min)


def shortened(cut: Cut, mask: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Mask, position embeddings and ids of the queries that are left of a layer's call, `mask` that of the whole one."""
    left: dict[str, Any] = {
        "attention_mask": None if mask is None else hide(cut.edges(mask), cut.key_filler[:, None, None, :]),
        "position_embeddings": tuple(cut.rows(part, -2) for part in kwargs["position_embeddings"]),
    }
    if isinstance(kwargs.get("position_ids"), Tensor):
        left["position_ids"] = cut.rows(kwargs["position_ids"], -1)
    return left


# residual: what leaves the layer; attention, mlp: what leaves that part of the layer.
COMPONENTS = ("residual", "attention", "mlp")


def component_of(layer: nn.Module, component: str) -> nn.Module:
    """The submodule of a decoder layer whose output is `component`.

    Raises ValueError for an unknown component, or a layer without it.
    """
    if component not in COMPONENTS:
        raise ValueError(f"unknown component {component!r}: there are {', '.join(COMPONENTS)}")
    names = {"residual": "", "attention": "self_attn", "mlp": "mlp"}
    try:
        return layer.get_submodule(names[component])
    except AttributeError:
        raise ValueError(f"{type(layer).__name__} has no {names[component]}: its {component} is not found") from None


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a decoder layer is called with."""
    return args[0] if args else kwargs["hidden_states"]


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a module's output: layers give a tensor, attention a tuple that starts with it."""
    return output[0] if isinstance(output, tuple) else output
