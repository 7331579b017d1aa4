"""Records attention statistics by token group while the model keeps its own attention kernel."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

from probes.attention.record import RECORDING, AttentionRecord, groups_of_call
from probes.attention.statistics import Layout, group_statistics
from probes.attention.visibility import Visibility
from probes.hooks.decoder import attention_family, decoder_layers
from probes.hooks.partial_call import Cut, cut_of
from probes.hooks.token_window import TokenWindow
from probes.tokens.token_map import TokenMap

# Arguments that change the attention weights, or hand over the keys, in ways the statistics do not model.
UNSUPPORTED = ("position_bias", "cache", "block_table")


# Layers share a layout; where some slide, they share two.
LAYOUTS = 2


_entering = threading.Lock()


class _Recorder:
    """Has a stack's attention modules call `attend` while used as a context."""

    def __init__(
        self, decoder: nn.Module, tokens: TokenMap, record: AttentionRecord, window: TokenWindow, all_heads: bool
    ) -> None:
        self.record, self.window = record, window
        self.heads = None if all_heads else torch.tensor(record.heads)
        self.targets = tuple(tokens.index(target) for target in record.targets)
        self.layers = layers = decoder_layers(decoder)
        self.layer_of = {layers[layer].get_submodule("self_attn"): layer for layer in record.layers}
        self.layouts: dict[Any, tuple[Visibility, Layout]] = {}
        self.name = f"{RECORDING}{id(self)}"

    def __enter__(self) -> None:
        with _entering:
            self.configs: dict[nn.Module, PretrainedConfig] = {module: module.config for module in self.layer_of}  # type: ignore[misc]
            if any(str(config._attn_implementation).startswith(RECORDING) for config in self.configs.values()):
                raise RuntimeError("this model is being recorded already: leave the other record_attention first")
            AttentionInterface.register(self.name, self.attend)
            self.own: dict[nn.Module, PretrainedConfig] = {}
            for module, config in self.configs.items():
                self.own[module] = copy.copy(config)
                self.own[module]._attn_implementation_internal = self.name
                module.config = self.own[module]  # type: ignore[assignment]

    def __exit__(self, *exception: object) -> None:
        for module, config in self.configs.items():
            module.config = config  # type: ignore[assignment]
        # The interface offers no way to unregister.
        AttentionInterface._global_mapping.pop(self.name)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        config = self.configs[module]
        implementation = config._attn_implementation
        self.add(module, attention_family(implementation), query, key, attention_mask, kwargs)  # type: ignore[arg-type]
        # Flash attention picks its kernel by the config of the module.
        module.config = config  # type: ignore[assignment]
        try:
            return _attention_function(implementation, module)(module, query, key, value, attention_mask, **kwargs)
        finally:
            module.config = self.own[module]  # type: ignore[assignment]

    def add(
        self, module: nn.Module, family: str, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> None:
        """The statistics of one call."""
        unsupported = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
        if unsupported:
            raise ValueError(f"attention with {', '.join(unsupported)} cannot be recorded ({type(module).__name__})")
        is_causal = kwargs.get("is_causal")
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        visible = Visibility.of_call(family, mask, causal, query.shape[2], key.shape[2], kwargs)
        scaling, sinks = kwargs.get("scaling"), kwargs.get("s_aux")
        if self.heads is not None:
            chosen = self.heads.to(query.device)
            key = key[:, chosen // (query.shape[1] // key.shape[1])]
            query, sinks = query[:, chosen], None if sinks is None else sinks.flatten()[chosen]
        layer = self.layer_of[module]
        cut = cut_of(self.layers[layer])
        sums = group_statistics(
            query,
            key,
            query.shape[-1] ** -0.5 if scaling is None else scaling,
            self.layout(visible, query, key, cut),
            kwargs.get("softcap"),
            sinks,
        )
        self.record._add(layer, self.window, cut, key.shape[2], sums)

    def layout(self, visible: Visibility, query: Tensor, key: Tensor, cut: Cut | None) -> Layout:
        """Of this call, or that of an earlier layer in the same forward pass."""
        window, keys = self.window, key.shape[2]
        place = visible.key and (visible.key, window.rows.start, window.start, query.shape[2], keys, query.device, cut)
        if place is None or place not in self.layouts:
            queries, sources = groups_of_call(window, cut, keys)
            layout = Layout.build(
                queries.to(query.device),
                sources.to(query.device),
                self.targets,
                tuple(range(len(self.record.sources))),
                visible,
                query.shape[1],
                key.shape[1],
            )
            if place is None:
                return layout
            # The visibility is kept too, so that its mask lives and no other takes its place.
            self.layouts[place] = visible, layout
            while len(self.layouts) > LAYOUTS:
                self.layouts.pop(next(iter(self.layouts)))
        return self.layouts[place][1]


def _attention_function(implementation: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """What the model calls for `implementation`: eager attention is each modelling file's own."""
    if implementation == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return AttentionInterface()[implementation]
