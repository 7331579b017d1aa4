"""Records attention statistics by token group while the model keeps its own attention kernel."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from probes.decoder import IMPLEMENTATIONS, RECORDING, TokenWindow, decoder_layers, find_decoder, select_layers
from probes.statistics import Layout, Sums, group_statistics
from probes.tokens import TokenMap

if TYPE_CHECKING:
    import pandas as pd

# Arguments that change the attention weights in ways the statistics do not model, such as Gemma 2's soft cap.
UNSUPPORTED = ("softcap", "s_aux", "position_bias")


class AttentionRecord:
    """Attention of target groups to source groups, per layer, sample and head, as float32 on the CPU.

    All means run over the queries of `target` that can see (the mask lets through) at least one position of `source`;
    where there is no such query the cell is NaN, and so it is where an intervention hides the source in that layer.

    Attributes:
        layers: Decoder layers on the first axis.
        targets: Groups on the target axis, whose queries were recorded.
        sources: Groups on the source axis: all of the token map.
    """

    def __init__(self, tokens: TokenMap, layers: tuple[int, ...], targets: tuple[str, ...]) -> None:
        self.layers, self.targets, self.sources = layers, targets, tokens.groups
        self._tokens = tokens
        self._sums: dict[int, Sums] = {}
        self._layouts: dict[tuple[int, int, int], Layout] = {}

    @property
    def mass(self) -> Float[Tensor, "layers batch heads targets sources"]:
        """Mean of the total attention on `source`, in 0 to 1 (LLaVA-Mini, Figure 2, for each head).

        The sources of a query sum to 1; the means do so only where all queries of the target see the same sources.
        """
        return self._stack("mass") / self._stack("queries")[:, :, None]

    @property
    def entropy(self) -> Float[Tensor, "layers batch heads targets sources"]:
        """Mean entropy of the attention within `source`, renormalised to 1, in nats (LLaVA-Mini, Figure 3)."""
        return self._stack("entropy") / self._stack("queries")[:, :, None]

    @property
    def received(self) -> Float[Tensor, "layers batch heads targets positions"]:
        """Mean attention on each position, over the queries of `target` that can see this position."""
        return self._stack("received") / self._stack("receivers")[:, :, None]

    @property
    def queries(self) -> Float[Tensor, "layers batch targets sources"]:
        """How many queries of `target` could see `source`: by layer, as windows and interventions differ by layer."""
        return self._stack("queries")

    def frame(self) -> pd.DataFrame:
        """One row for each cell: layer, sample, head, target, source, mass, entropy, queries."""
        import pandas as pd

        mass = self.mass
        _, batch, heads, _, _ = mass.shape
        axes = [self.layers, range(batch), range(heads), self.targets, self.sources]
        index = pd.MultiIndex.from_product(axes, names=["layer", "sample", "head", "target", "source"])
        queries = self.queries[:, :, None].expand_as(mass)
        columns = {"mass": mass, "entropy": self.entropy, "queries": queries.long()}
        return pd.DataFrame({name: values.flatten().numpy() for name, values in columns.items()}, index).reset_index()

    def _stack(self, name: str) -> Tensor:
        if len(self._sums) < len(self.layers):
            raise RuntimeError(
                "nothing was recorded: no complete forward pass of the model ran inside record_attention"
            )
        return torch.stack([getattr(self._sums[layer], name).cpu() for layer in self.layers])

    def _add(
        self,
        layer: int,
        window: TokenWindow,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
    ) -> None:
        """Adds one call of one layer; `causal` as in `group_statistics`."""
        if window.start == 0 and layer in self._sums:
            raise RuntimeError("a second prompt ran inside one record_attention: open one for each batch")
        length, keys = query.shape[2], key.shape[2]

        place = (window.start, length, keys)
        if place not in self._layouts:
            targets = tuple(self._tokens.index(target) for target in self.targets)
            sources = tuple(range(len(self.sources)))
            # Layers share a layout, or two where some slide; those of earlier calls are of no use.
            self._layouts = {old: layout for old, layout in self._layouts.items() if old[0] == window.start}
            self._layouts[place] = Layout.build(window.queries, window.keys(keys), targets, sources)
        sums = group_statistics(query, key, mask, causal, scale, self._layouts[place])

        # From keys to positions: a sliding cache starts late, a static one ends in empty slots.
        first = window.first_key(keys)
        sums = replace(
            sums,
            received=nn.functional.pad(sums.received, (first, 0))[..., : window.stop],
            receivers=nn.functional.pad(sums.receivers, (first, 0))[..., : window.stop],
        )
        self._sums[layer] = self._sums[layer] + sums if layer in self._sums else sums


@contextmanager
def record_attention(
    model: PreTrainedModel,
    tokens: TokenMap,
    layers: Iterable[int] | None = None,
    targets: Iterable[str] | None = None,
) -> Iterator[AttentionRecord]:
    """Records what the decoder's self-attention does in one forward pass, or one prompt and its cached decoding.

    The model's own implementation (sdpa or eager) still computes the output, so the logits are those without
    recording, to the bit; no attention matrix of all queries is ever held. Statistics are in float32, before dropout.
    Only layers of the decoder are recorded, found by identity: not the vision tower, nor extra layers elsewhere in the
    model, even if they share the decoder's config. In decoding, every position after the prompt counts as a response,
    also those that `generate` feeds to rows that have ended.

    While recording, the decoder's config names an implementation registered for this record alone; on leaving, also
    by an exception, the config is restored and the name is removed from transformers' registries.

    Args:
        model: A transformers model whose decoder uses the attention interface.
        tokens: Map of the inputs that the model will be called with.
        layers: Decoder layers to record; all by default.
        targets: Groups whose queries to record; all but `pad` by default. Fewer cost less.

    Raises:
        ValueError: An unknown layer or group, a model that cannot be recorded, or a call that `tokens` do not fit.
        RuntimeError: The model is being recorded already, a second prompt runs in the same record, or the record is
            read before a forward pass.
    """
    decoder = find_decoder(model)
    implementation = decoder.config._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        raise RuntimeError("this model is being recorded already: leave the other record_attention first")
    groups = tuple(group for group in tokens.groups if group != "pad") if targets is None else tuple(targets)
    if not groups:
        raise ValueError(f"targets are empty: name at least one of {', '.join(tokens.groups)}")
    for group in groups:
        tokens.index(group)
    record = AttentionRecord(tokens, select_layers(decoder, layers), groups)
    window = TokenWindow(decoder, tokens)
    modules = [layer.get_submodule("self_attn") for layer in decoder_layers(decoder)]
    recorded = {modules[layer]: layer for layer in record.layers}

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        layer = recorded.get(module)
        if layer is not None:
            unsupported = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
            if unsupported:
                raise ValueError(
                    f"attention with {', '.join(unsupported)} cannot be recorded ({type(module).__name__})"
                )
            if attention_mask is not None:
                _check_mask(attention_mask, implementation)
            is_causal = kwargs.get("is_causal")
            causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
            scaling = kwargs.get("scaling")
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            # Without a mask, eager attention hides nothing, and sdpa neither from a single query.
            causal = causal and implementation == "sdpa" and query.shape[2] > 1
            record._add(layer, window, query, key, attention_mask, causal, scale)
        return _attention_function(implementation, module)(module, query, key, value, attention_mask, **kwargs)

    name = f"{RECORDING}{id(record)}"
    AttentionInterface.register(name, attend)
    # Without this the masks would arrive as None and padding would be ignored.
    AttentionMaskInterface.register(name, AttentionMaskInterface()[implementation])
    try:
        decoder.set_attn_implementation(name)
        configs: list[Any] = [module.config for module in modules]
        if any(config._attn_implementation != name for config in configs):
            raise ValueError(f"{type(decoder).__name__} does not use the attention interface: it cannot be recorded")
        with window:
            yield record
    finally:
        decoder.set_attn_implementation(implementation)
        # The interfaces offer no way to unregister.
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)


def _attention_function(implementation: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """What the model calls for `implementation`: eager attention is each modelling file's own."""
    if implementation == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return AttentionInterface()[implementation]


def _check_mask(mask: Tensor, implementation: str) -> None:
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise ValueError(f"cannot record under a mask of shape {list(mask.shape)}: [batch, 1, queries, keys] is needed")
    if implementation == "eager" and mask.dtype == torch.bool:
        raise ValueError("eager attention adds its mask to the scores, a bool one as 0 and 1: pass an additive mask")
