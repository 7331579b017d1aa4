"""The record of attention between token groups, and what can be read off it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.attention.statistics import Sums
from probes.hooks.partial_call import Cut
from probes.hooks.token_window import TokenWindow
from probes.tokens.token_map import TokenMap

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


# Prefix of the implementations that are registered while recording.
RECORDING = "probes_recording_"


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


def groups_of_call(
    window: TokenWindow, cut: Cut | None, keys: int
) -> tuple[Int[Tensor, "batch queries"], Int[Tensor, "batch keys"]]:
    """Groups of a call's queries and of its keys, -1 for what only fills up."""
    if cut is None:
        return window.queries, window.keys(keys)
    queries = cut.rows(window.queries).masked_fill(cut.filler, -1)
    return queries, window.labels.gather(1, cut.keys).masked_fill(cut.key_filler, -1)
