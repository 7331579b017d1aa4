"""Records attention statistics by token group while the model keeps its own attention kernel."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from probes.cut import Cut, cut_of
from probes.decoder import FAMILIES, TokenWindow, attention_family, decoder_layers, find_decoder, select_layers
from probes.statistics import Layout, Sums, group_statistics
from probes.tokens import TokenMap
from probes.visibility import Visibility

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# Prefix of the implementations that are registered while recording.
RECORDING = "probes_recording_"
# Arguments that change the attention weights, or hand over the keys, in ways the statistics do not model.
UNSUPPORTED = ("position_bias", "cache", "block_table")
# Layers share a layout; where some slide, they share two.
LAYOUTS = 2
_entering = threading.Lock()


class AttentionRecord:
    """Attention of target groups to source groups, per layer, sample and head, as float32 on the CPU.

    All means run over the queries of `target` that can see (the mask lets through) at least one position of `source`;
    where there is no such query the cell is NaN, and so it is where an intervention hides the source in that layer.

    A sample is a row of the token map. Where the model gets each row several times (beams, several answers to one
    prompt), a sample is a row of the model's batch: row r of the map is at r * copies to (r + 1) * copies - 1. Beam
    search moves beams between these rows as it goes, so each holds the steps that stood there, not one final answer.

    Attributes:
        layers: Layers on the first axis.
        heads: Query heads on the heads axis.
        targets: Groups on the target axis, whose queries were recorded.
        sources: Groups on the source axis: all of the token map.
    """

    def __init__(
        self, tokens: TokenMap, layers: tuple[int, ...], heads: tuple[int, ...], targets: tuple[str, ...]
    ) -> None:
        self.layers, self.heads, self.targets, self.sources = layers, heads, targets, tokens.groups
        self._shape = tokens.labels.shape
        self._sums: dict[int, Sums] = {}
        self._ends: dict[int, tuple[int, int]] = {}  # how far each layer has come: row and position of the map

    @property
    def mass(self) -> Float[Tensor, "layers batch heads targets sources"]:
        """Mean of the total attention on `source`, in 0 to 1 (LLaVA-Mini, Figure 2, for each head).

        The sources of a query sum to 1, to less where the model has attention sinks; the means do so only where all
        queries of the target see the same sources.
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
        axes = [self.layers, range(mass.shape[1]), self.heads, self.targets, self.sources]
        index = pd.MultiIndex.from_product(axes, names=["layer", "sample", "head", "target", "source"])
        queries = self.queries[:, :, None].expand_as(mass)
        columns = {"mass": mass, "entropy": self.entropy, "queries": queries.long()}
        return pd.DataFrame({name: values.flatten().numpy() for name, values in columns.items()}, index).reset_index()

    def plot(self) -> Figure:
        """Mass and entropy by layer, a panel for each target; see `probes.plots.plot_attention`."""
        from probes.plots import plot_attention

        return plot_attention(self)

    def _stack(self, name: str) -> Tensor:
        if len(self._sums) < len(self.layers):
            raise RuntimeError(
                "nothing was recorded: no complete forward pass of the model ran inside record_attention"
            )
        rows, positions = min(self._ends.values())
        if rows < self._shape[0] or positions < self._shape[1]:
            raise RuntimeError(
                f"the record is not complete: the model ran {rows} x {positions} of the token map's "
                f"{self._shape[0]} x {self._shape[1]} positions (batch x length)"
            )
        return torch.stack([getattr(self._sums[layer], name).cpu() for layer in self.layers])

    def _add(self, layer: int, window: TokenWindow, cut: Cut | None, keys: int, sums: Sums) -> None:
        """Adds one call of one layer, over `keys` keys: later positions of the same rows, or further rows."""
        sums = sums.moved(window.first_key(keys), window.stop) if cut is None else sums.spread(cut.keys, window.stop)
        rows, positions = self._ends.get(layer, (0, 0))
        further = window.rows.start >= rows
        if layer in self._sums and not further and window.start < positions:
            raise RuntimeError("a second prompt ran inside one record_attention: open one for each batch")
        # Rows whose call is shorter end in padding that no call covers.
        self._ends[layer] = window.rows.stop, self._shape[1] if window.padded else window.stop
        if layer in self._sums:
            before = self._sums[layer]
            sums = before.beside(sums) if further else before + sums
        self._sums[layer] = sums


@contextmanager
def record_attention(
    model: PreTrainedModel,
    tokens: TokenMap,
    layers: Iterable[int] | None = None,
    targets: Iterable[str] | None = None,
    heads: Iterable[int] | None = None,
    backend: str = "native",
) -> Iterator[AttentionRecord]:
    """Records what a stack's self-attention does in one forward pass, or one prompt and its cached decoding.

    The model's own implementation still computes the output, so the logits are those without recording, to the bit; no
    attention matrix of all queries is ever held. It may be sdpa, eager, flex attention, flash attention, or any other
    that is registered with the masks of one of these. Statistics are in float32, from the queries and keys as they are,
    before dropout. The prompt may be run in chunks that share a cache.

    Only layers of the stack that `tokens` are of are recorded, found by identity: the language model's, or LLaVA-Mini's
    pre-fusion layers, but not the vision tower, nor extra layers elsewhere in the model. In decoding, every position
    after the prompt counts as a response, also those that `generate` feeds to rows that have ended.

    While recording, the attention modules of these layers have a config of their own, which names an implementation
    registered for this record alone; on leaving, also by an exception, they have their old one back, and the name is
    removed from transformers' registry. Several models may be recorded at the same time, in one thread or in several,
    and so may the two stacks of one model.

    Args:
        model: A transformers model whose decoder uses the attention interface.
        tokens: Map of the inputs that the model will be called with.
        layers: Layers of the stack to record; all by default.
        targets: Groups whose queries to record; all but `pad` by default. Fewer cost less.
        heads: Query heads to record; all by default. Fewer cost less.
        backend: "nnsight" or "transformer_lens" to record what these libraries show, to check this one or beside
            experiments of theirs. `model` may be an `NNsight` or a `TransformerBridge` then. Attention is eager, and
            whole matrices are held, one layer's at a time; see `probes.backends.observe`.

    Raises:
        ValueError: An unknown layer, head or group, a model that cannot be recorded, or a call that `tokens` do not
            fit, is packed, paged, or has a mask that cannot be read.
        RuntimeError: The layers are being recorded already, a second prompt or a second thread runs in the same record,
            decoding goes back, or the record is read before a whole prompt has run.
    """
    # These import this file.
    from probes.backends import record_through, underlying_model

    held = underlying_model(model, backend)
    decoder = find_decoder(held, tokens.stack, FAMILIES.values())
    if not held.get_decoder()._can_set_attn_implementation():
        raise ValueError(f"{type(decoder).__name__} does not use the attention interface: it cannot be recorded")
    groups = tuple(group for group in tokens.groups if group != "pad") if targets is None else tuple(targets)
    if not groups:
        raise ValueError(f"targets are empty: name at least one of {', '.join(tokens.groups)}")
    for group in groups:
        tokens.index(group)
    chosen = _select_heads(decoder.config.num_attention_heads, heads)
    record = AttentionRecord(tokens, select_layers(decoder, layers), chosen, groups)
    if backend != "native":
        with record_through(backend, model, tokens, record):
            yield record
        return
    window = TokenWindow(decoder, tokens)
    with _Recorder(decoder, tokens, record, window, all_heads=heads is None), window:
        yield record


def _select_heads(count: int, heads: Iterable[int] | None) -> tuple[int, ...]:
    """`heads` in ascending order without doubles, or all. Raises ValueError for none or one outside the model."""
    selected = tuple(sorted(set(range(count) if heads is None else heads)))
    outside = [head for head in selected if not 0 <= head < count]
    if outside or not selected:
        wrong = f"{outside} are unknown" if outside else "are empty"
        raise ValueError(f"heads {wrong}: the model has {count} query heads, 0 to {count - 1}")
    return selected


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


def groups_of_call(
    window: TokenWindow, cut: Cut | None, keys: int
) -> tuple[Int[Tensor, "batch queries"], Int[Tensor, "batch keys"]]:
    """Groups of a call's queries and of its keys, -1 for what only fills up."""
    if cut is None:
        return window.queries, window.keys(keys)
    queries = cut.rows(window.queries).masked_fill(cut.filler, -1)
    return queries, window.labels.gather(1, cut.keys).masked_fill(cut.key_filler, -1)


def _attention_function(implementation: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """What the model calls for `implementation`: eager attention is each modelling file's own."""
    if implementation == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return AttentionInterface()[implementation]
