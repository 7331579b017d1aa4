"""Attention through TransformerLens, and checks of which of its hooks can fire."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from probes.attention.backends import ObserveAttention

# The bridge's name of each stack that a token map may describe.
STACK_PREFIXES = {"decoder": "blocks", "prefusion": "prefusion"}
# Hooks that transformer-lens 4.3 makes and never calls: patterns of their names, and which hook to read instead.
UNCALLED_HOOKS = {
    r"vision_projector\.hook_projected": "nothing calls it; read vision_projector.hook_out",
    r"vision_encoder\.hook_(patch|pos)_embed": "nothing calls it; read vision_encoder.embeddings.hook_out",
    r"rotary_emb\.hook_out": "nothing calls it; read rotary_emb.hook_cos and rotary_emb.hook_sin",
    r".*\.attn\.hook_hidden_states": "nothing calls it; read attn.hook_out",
}


def wrap(model: PreTrainedModel) -> TransformerBridge:
    """Return a TransformerLens bridge around `model`, which it rebuilds in place.

    Pass `copy_sharing_weights(model)` to keep the model itself unchanged. Unlike
    `TransformerBridge.boot_transformers`, this function loads and installs nothing.

    Args:
        model: A transformers model with an adapter in TransformerLens.

    Returns:
        The bridge.

    Raises:
        ValueError: TransformerLens has no adapter for this class of models, or has rebuilt this model already.

    Example:
        >>> from probes.attention.backends.shared_copy import copy_sharing_weights
        >>> from probes.attention.backends.transformer_lens import wrap
        >>> bridge = wrap(copy_sharing_weights(model))
        >>> "blocks.0.attn.hook_pattern" in bridge.hook_dict
        True
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
    try:
        bridge = build_bridge_from_module(model, architecture, hf_config=model.config)
    except AttributeError as error:
        raise ValueError(
            f"TransformerLens has no adapter for this {architecture}, whose modules have other names ({error}): "
            "use backend='native'"
        ) from error
    _read_cache_argument(bridge)
    return bridge


def _read_cache_argument(bridge: TransformerBridge) -> None:
    """Let each attention of a bridge read the argument `cache`, as which transformers passes the cache from 5.24 on.

    transformer-lens 4.3 reads only the older `past_key_values`. A decoded token would then attend to itself alone.
    """
    for attention in bridge.modules():
        if not isinstance(attention, AttentionBridge) or "_update_kv_cache" in vars(attention):
            continue

        def update_cache(
            keys: Tensor, values: Tensor, *, update: Any = attention._update_kv_cache, **kwargs: Any
        ) -> Any:
            if kwargs.get("past_key_values") is None:
                kwargs["past_key_values"] = kwargs.get("cache")
            return update(keys, values, **kwargs)

        attention.__dict__["_update_kv_cache"] = update_cache


def unwrap(bridge: Any) -> PreTrainedModel:
    """Return the transformers model inside `bridge`.

    Raises:
        ValueError: `bridge` is not a TransformerBridge of a transformers model.
    """
    model = bridge.original_model if isinstance(bridge, TransformerBridge) else None
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"a {type(bridge).__name__} cannot be recorded with backend='transformer_lens': "
            "pass a transformers model or a TransformerBridge of one"
        )
    return model


def call_model(bridge: TransformerBridge, *args: Any, **kwargs: Any) -> Any:
    """Call the model, and return its output.

    The bridge's own call would derive position ids and return only the logits.
    """
    return bridge.original_model(*args, **kwargs)


@contextmanager
def observe_layers(
    bridge: TransformerBridge, stack: str, layers: tuple[int, ...], observe: ObserveAttention
) -> Iterator[None]:
    """Read `hook_attn_scores` and `hook_pattern` of `layers` in every call.

    Hooks run in the order in which they were added: one that edits a pattern inside the block comes after ours.

    Args:
        bridge: The bridge around the model.
        stack: The stack of the layers: "decoder" or "prefusion".
        layers: Indices of the layers.
        observe: Called with the layer's index, its masked scores and its attention weights.

    Raises:
        ValueError: The bridge has no such hooks.
    """
    _read_cache_argument(bridge)  # the user may have made this bridge without `wrap`
    pending_scores: dict[int, Tensor] = {}
    captures: dict[int, _SoftmaxCapture] = {}

    def store_scores(tensor: Tensor, hook: HookPoint, layer: int) -> None:
        pending_scores[layer] = tensor

    def report(tensor: Tensor, hook: HookPoint, layer: int) -> None:
        # A bridge that calls the model's own attention passes the weights to `hook_attn_scores`, after this hook.
        scores = captures[layer].pop() if layer in captures else None
        scores = pending_scores.pop(layer, None) if scores is None else scores
        if scores is None:
            raise ValueError(f"the bridge exposes no attention scores in layer {layer}: use backend='native'")
        observe(layer, scores, tensor)

    names = {layer: f"{STACK_PREFIXES[stack]}.{layer}.attn" for layer in layers}
    _check_names(bridge, [f"{name}.hook_pattern" for name in names.values()])
    hooks = [(f"{name}.hook_attn_scores", partial(store_scores, layer=layer)) for layer, name in names.items()]
    hooks += [(f"{name}.hook_pattern", partial(report, layer=layer)) for layer, name in names.items()]
    with ExitStack() as hooks_of_modules:
        for layer, name in names.items():
            attention = getattr(bridge.get_submodule(name), "original_component", None)
            if isinstance(attention, nn.Module):
                captures[layer] = _SoftmaxCapture(attention, hooks_of_modules)
        with bridge.hooks(fwd_hooks=hooks):
            yield


class _SoftmaxCapture(TorchFunctionMode):
    """Keeps the masked scores that a module's softmax received in its last call, until they are taken.

    Args:
        attention: The model's own attention module, which some bridges call.
        stack: Gets the callbacks that remove the hooks.
    """

    def __init__(self, attention: nn.Module, stack: ExitStack) -> None:
        super().__init__()
        self.scores: Tensor | None = None
        self._entered = False
        stack.callback(attention.register_forward_pre_hook(self._begin).remove)
        # Always, since the interception must not outlive a call that raises.
        stack.callback(attention.register_forward_hook(self._end, always_call=True).remove)
        stack.callback(self._end, attention, None, None)  # torch calls no hook after a KeyboardInterrupt

    def pop(self) -> Tensor | None:
        """Return the scores of the last call, once; None if the module did not run."""
        scores, self.scores = self.scores, None
        return scores

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.softmax:
            self.scores = args[0] if args else kwargs["input"]
        return func(*args, **(kwargs or {}))

    def _begin(self, attention: nn.Module, args: Any) -> None:
        self.scores, self._entered = None, True
        self.__enter__()

    def _end(self, attention: nn.Module, args: Any, output: Any) -> None:
        if self._entered:
            self._entered = False
            self.__exit__(None, None, None)


def unavailable_hooks(bridge: TransformerBridge) -> dict[str, str]:
    """Return the hooks of this bridge that cannot fire with its current settings.

    Args:
        bridge: The bridge around a model.

    Returns:
        The name of each such hook, with the reason and, where there is one, the setting or the hook to use instead.

    Example:
        >>> from probes.attention.backends.shared_copy import copy_sharing_weights
        >>> from probes.attention.backends.transformer_lens import unavailable_hooks, wrap
        >>> unavailable_hooks(wrap(copy_sharing_weights(model)))["blocks.0.attn.hook_result"]
        'call set_use_attn_result(True) on the bridge first'
    """
    reasons = {}
    for name, hook_point in bridge.hook_dict.items():
        hook_name = hook_point.name or name  # an alias resolves to it
        parent, _, hook = hook_name.rpartition(".")
        setter = bridge._gated_hook_reason(hook_name)
        never_called = [reason for pattern, reason in UNCALLED_HOOKS.items() if re.fullmatch(pattern, hook_name)]
        norm = re.fullmatch(r"hook_([qk]_norm)ed", hook)
        if setter is not None:
            reasons[name] = f"call set_{setter}(True) on the bridge first"
        elif never_called:
            reasons[name] = never_called[0]
        elif norm and norm[1] not in bridge.get_submodule(parent).submodules:
            reasons[name] = "this model does not normalise queries and keys"
    return reasons


def check_hooks(bridge: TransformerBridge, names: Iterable[str], inputs: Mapping[str, Any]) -> dict[str, int]:
    """Run the model once and count how often each hook fires, so that none is silently empty later.

    Args:
        bridge: The bridge around a model.
        names: Names or aliases of hooks, such as `blocks.0.attn.hook_pattern`.
        inputs: Inputs of the transformers model.

    Returns:
        For each name, how often it fired: once, or once for each chunk of frames.

    Raises:
        ValueError: A hook that the bridge does not have, or that cannot fire (see `unavailable_hooks`).
        RuntimeError: A hook did not fire.

    Example:
        >>> from probes.attention.backends.shared_copy import copy_sharing_weights
        >>> from probes.attention.backends.transformer_lens import check_hooks, wrap
        >>> check_hooks(wrap(copy_sharing_weights(model)), ["blocks.0.attn.hook_pattern"], inputs)
        {'blocks.0.attn.hook_pattern': 1}
    """
    counts = dict.fromkeys(names, 0)
    _check_names(bridge, counts)

    def count(tensor: Tensor, hook: HookPoint, name: str) -> None:
        counts[name] += 1

    with bridge.hooks(fwd_hooks=[(name, partial(count, name=name)) for name in counts]):
        bridge.original_model(**inputs)
    if silent := [name for name, fired in counts.items() if not fired]:
        raise RuntimeError(
            f"hooks {', '.join(silent)} never fired with inputs {', '.join(inputs)}: pass inputs that reach them"
        )
    return counts


def _check_names(bridge: TransformerBridge, names: Iterable[str]) -> None:
    unavailable = unavailable_hooks(bridge)
    for name in names:
        if bridge.get_hook_point(name) is None:
            raise ValueError(f"this bridge has no hook {name!r}: bridge.hook_dict lists the names")
        if name in unavailable:
            raise ValueError(f"hook {name!r} cannot fire: {unavailable[name]}")
