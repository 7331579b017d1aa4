"""Attention functions that record statistics by token group while the model keeps its own attention kernel."""

from __future__ import annotations

import sys
import threading
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from probes.attention.attention_switch import AttentionFunction, AttentionSwitch, is_switched
from probes.attention.kernel_log_sum_exp import LogSumExpWatch
from probes.attention.layout import GroupLayout
from probes.attention.output_projection import OutputProjection
from probes.attention.record import AttentionRecord, query_and_key_groups
from probes.attention.statistics import AttentionCall, group_statistics
from probes.attention.visibility import Visibility
from probes.hooks.decoder import decoder_layers, mask_format
from probes.hooks.partial_call import CallSubset, current_subset
from probes.hooks.token_window import TokenWindow
from probes.tokens.token_map import TokenMap
from probes.unwrapping import unwrap_module

# Arguments that change the attention weights, or pass the keys, in ways that the statistics do not model.
UNSUPPORTED_ARGUMENTS = ("position_bias", "cache", "block_table")
# Layers share a layout; in models with some sliding layers, there are two.
CACHED_LAYOUTS = 2

_ENTER_LOCK = threading.Lock()


class AttentionRecorder:
    """Makes a stack's attention modules call `attend` while it is used as a context.

    Args:
        decoder: The stack of decoder layers.
        tokens: Map of the inputs.
        record: The record to fill; it names the layers, heads and targets.
        window: The positions of the map that the current call covers.
        all_heads: Whether `record` has all heads of the model.
    """

    def __init__(
        self, decoder: nn.Module, tokens: TokenMap, record: AttentionRecord, window: TokenWindow, all_heads: bool
    ) -> None:
        self.record, self.window = record, window
        self.heads = None if all_heads else torch.tensor(record.heads)
        self.targets = tuple(record.target_tokens.index(target) for target in record.targets)
        self.layers = layers = decoder_layers(decoder)
        self.layer_of = {unwrap_module(layers[layer].get_submodule("self_attn")): layer for layer in record.layers}
        self.layouts: dict[Any, tuple[Visibility, GroupLayout]] = {}
        self.projections: dict[nn.Module, OutputProjection] = {}
        if "contribution" in record.statistics:
            self.projections = {attention: OutputProjection(attention) for attention in self.layer_of}
        self._hooks = ExitStack()

    def __enter__(self) -> None:
        with _ENTER_LOCK:
            if any(map(is_switched, self.layer_of)):
                raise RuntimeError("this model is being recorded already: leave the other record_attention first")
            self.switch = AttentionSwitch(self.layer_of, self.attend)
        for projection in self.projections.values():
            projection.install(self._hooks)

    def __exit__(self, *exception: object) -> None:
        self.switch.restore()
        self._hooks.close()

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output of the model's own attention function, and record the statistics of the call."""
        implementation = self.switch.own_configs[module]._attn_implementation
        visible = self.visibility_of_call(module, implementation, query, key, attention_mask, kwargs)  # type: ignore[arg-type]
        function = _attention_function(implementation, module)  # type: ignore[arg-type]
        watch = LogSumExpWatch()
        with watch if set(self.record.statistics) == {"mass"} else nullcontext():
            output = self.switch.call_own(module, function, query, key, value, attention_mask, **kwargs)
        scaling, sinks = kwargs.get("scaling"), kwargs.get("s_aux")
        call = AttentionCall(
            query,
            key,
            query.shape[-1] ** -0.5 if scaling is None else scaling,
            value,
            kwargs.get("softcap"),
            sinks,
            watch.of_call(query) if sinks is None else None,
        )
        if module in self.projections:
            gram, gate = self.projections[module].read(output[0])
            call = replace(call, output_gram=gram, gate=gate)
        self.add_statistics(module, call, visible)
        return output  # type: ignore[no-any-return]

    def visibility_of_call(
        self, module: nn.Module, implementation: str, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> Visibility:
        """Return which keys the queries of a call can attend to.

        Raises:
            ValueError: The call has an argument or a mask that the statistics do not model.
        """
        unsupported = [name for name in UNSUPPORTED_ARGUMENTS if kwargs.get(name) is not None]
        if unsupported:
            raise ValueError(f"attention with {', '.join(unsupported)} cannot be recorded ({type(module).__name__})")
        is_causal = kwargs.get("is_causal")
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        return Visibility.from_call(
            mask_format(implementation),  # type: ignore[arg-type]
            mask,
            causal,
            query.shape[2],
            key.shape[2],
            kwargs,
        )

    def add_statistics(self, module: nn.Module, call: AttentionCall, visible: Visibility) -> None:
        """Add the statistics of one call to the record."""
        if self.heads is not None:
            heads = self.heads.to(call.query.device)
            call = call.select_heads(heads, heads // (call.query.shape[1] // call.key.shape[1]))
        layer = self.layer_of[module]
        subset = current_subset(self.layers[layer])
        layout = self.layout_of_call(visible, call.query, call.key, subset, call.log_sum_exp is not None)
        sums = group_statistics(call, layout, self.record.statistics)
        self.record._add(layer, self.window, subset, call.key.shape[2], sums)

    def layout_of_call(
        self, visible: Visibility, query: Tensor, key: Tensor, subset: CallSubset | None, with_rest: bool
    ) -> GroupLayout:
        """Return the layout of this call, taken from an earlier layer of the same forward pass if possible."""
        window, keys = self.window, key.shape[2]
        cache_key = visible.cache_key and (
            visible.cache_key,
            window.rows.start,
            window.start,
            query.shape[2],
            keys,
            query.device,
            subset,
            with_rest,
        )
        if cache_key is None or cache_key not in self.layouts:
            query_groups, key_groups = query_and_key_groups(window, self.record.target_tokens, subset, keys)
            layout = GroupLayout.build(
                query_groups.to(query.device),
                key_groups.to(query.device),
                self.targets,
                tuple(range(len(self.record.sources))),
                visible,
                query.shape[1],
                key.shape[1],
                with_rest,
            )
            if cache_key is None:
                return layout
            # The visibility is kept too: its mask stays alive, so no other mask gets the same id.
            self.layouts[cache_key] = visible, layout
            while len(self.layouts) > CACHED_LAYOUTS:
                self.layouts.pop(next(iter(self.layouts)))
        return self.layouts[cache_key][1]


def _attention_function(implementation: str, module: nn.Module) -> AttentionFunction:
    """Return the function that the model calls for `implementation`.

    Each modelling file has its own eager attention.
    """
    if implementation == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return AttentionInterface()[implementation]
