"""Attention as TransformerLens shows it, and which of its hooks can fire."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from probes.attention.backends import See

# The bridge's names of the stacks that a token map may be of.
STACKS = {"decoder": "blocks", "prefusion": "prefusion"}
# Hooks that transformer-lens 4.3 makes and never calls: patterns of their names, and what to read instead.
UNAVAILABLE = {
    r"vision_projector\.hook_projected": "nothing calls it; read vision_projector.hook_out",
    r"vision_encoder\.hook_(patch|pos)_embed": "nothing calls it; read vision_encoder.embeddings.hook_out",
    r"rotary_emb\.hook_out": "nothing calls it; read rotary_emb.hook_cos and rotary_emb.hook_sin",
    r".*\.attn\.hook_hidden_states": "nothing calls it; read attn.hook_out",
}


def wrap(model: PreTrainedModel) -> TransformerBridge:
    """A bridge around `model`, which it rebuilds in place; pass `twin(model)` to keep the model.

    Unlike `TransformerBridge.boot_transformers`, this loads and installs nothing.

    Raises:
        ValueError: TransformerLens has no adapter for this class of models, or has rebuilt this one already.
    """
    if any(isinstance(module, GeneralizedComponent) for module in model.modules()):
        raise ValueError("TransformerLens has rebuilt this model already: pass its bridge")
    architecture = type(model).__name__
    ArchitectureAdapterFactory.discover_entry_points()
    if architecture not in ArchitectureAdapterFactory._adapters:
        raise ValueError(
            f"TransformerLens has no adapter for {architecture}: use backend='native', or import the module that "
            "registers one with its ArchitectureAdapterFactory"
        )
    return build_bridge_from_module(model, architecture, hf_config=model.config)


def held(bridge: Any) -> PreTrainedModel:
    model = bridge.original_model if isinstance(bridge, TransformerBridge) else None
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"a {type(bridge).__name__} is no TransformerBridge of a transformers model: it cannot be recorded"
        )
    return model


def run(bridge: TransformerBridge, *args: Any, **kwargs: Any) -> Any:
    """What the model returns; the bridge's own call would derive position ids and return the logits alone."""
    return bridge.original_model(*args, **kwargs)


@contextmanager
def hooked(bridge: TransformerBridge, stack: str, layers: tuple[int, ...], see: See) -> Iterator[None]:
    """Reads `hook_attn_scores` and `hook_pattern` of `layers` in every call.

    Hooks run in the order they were added: one that edits a pattern inside the block comes after ours.

    Raises:
        ValueError: The bridge has no such hooks.
    """
    pending: dict[int, Tensor] = {}

    def keep(tensor: Tensor, hook: HookPoint, layer: int) -> None:
        pending[layer] = tensor

    def both(tensor: Tensor, hook: HookPoint, layer: int) -> None:
        see(layer, pending.pop(layer), tensor)

    names = {layer: f"{STACKS[stack]}.{layer}.attn" for layer in layers}
    _check_names(bridge, [f"{name}.hook_pattern" for name in names.values()])
    hooks = [(f"{name}.hook_attn_scores", partial(keep, layer=layer)) for layer, name in names.items()]
    hooks += [(f"{name}.hook_pattern", partial(both, layer=layer)) for layer, name in names.items()]
    with bridge.hooks(fwd_hooks=hooks):
        yield


def unavailable_hooks(bridge: TransformerBridge) -> dict[str, str]:
    """The hooks of this bridge that cannot fire as it is set up now, and why."""
    reasons = {}
    for name, hook_point in bridge.hook_dict.items():
        own = hook_point.name or name  # that an alias leads to
        parent, _, hook = own.rpartition(".")
        setter = bridge._gated_hook_reason(own)
        declared = [reason for pattern, reason in UNAVAILABLE.items() if re.fullmatch(pattern, own)]
        norm = re.fullmatch(r"hook_([qk]_norm)ed", hook)
        if setter is not None:
            reasons[name] = f"call set_{setter}(True) on the bridge first"
        elif declared:
            reasons[name] = declared[0]
        elif norm and norm[1] not in bridge.get_submodule(parent).submodules:
            reasons[name] = "this model does not normalise queries and keys"
    return reasons


def check_hooks(bridge: TransformerBridge, names: Iterable[str], inputs: Mapping[str, Any]) -> dict[str, int]:
    """Runs the model once and counts how often each hook fires, so that none is silently empty later.

    Args:
        names: Names or aliases of hooks, `blocks.0.attn.hook_pattern` for example.
        inputs: What the transformers model is called with.

    Returns:
        For each name, how often it fired: once, or once for each chunk of frames.

    Raises:
        ValueError: A name that the bridge does not have, or that cannot fire (see `unavailable_hooks`).
        RuntimeError: A hook did not fire.
    """
    counts = dict.fromkeys(names, 0)
    _check_names(bridge, counts)

    def count(tensor: Tensor, hook: HookPoint, name: str) -> None:
        counts[name] += 1

    with bridge.hooks(fwd_hooks=[(name, partial(count, name=name)) for name in counts]):
        bridge.original_model(**inputs)
    if silent := [name for name, fired in counts.items() if not fired]:
        raise RuntimeError(f"hooks that never fired with inputs {', '.join(inputs)}: {', '.join(silent)}")
    return counts


def _check_names(bridge: TransformerBridge, names: Iterable[str]) -> None:
    unavailable = unavailable_hooks(bridge)
    for name in names:
        if bridge.get_hook_point(name) is None:
            raise ValueError(f"this bridge has no hook {name!r}; bridge.hook_dict lists what it has")
        if name in unavailable:
            raise ValueError(f"hook {name!r} cannot fire: {unavailable[name]}")
