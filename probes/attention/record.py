"""The record of attention between token groups, with the statistics that can be read from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.attention.statistics import GroupSums
from probes.hooks.partial_call import CallSubset
from probes.hooks.token_window import TokenWindow
from probes.tokens.token_map import TokenMap

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class AttentionRecord:
    """Attention from target groups to source groups, by layer, sample and head, as float32 on the CPU.

    `record_attention` yields it. Every mean runs over the queries of `target` that can attend to at least one position
    of `source` under the mask. Entries without such a query are NaN. This includes layers in which an intervention
    hides the source.

    A sample is a row of the token map. The model may get each row several times, for beams or for several answers to
    one prompt. Then a sample is a row of the model's batch: row r of the map is at r * copies to (r + 1) * copies - 1.
    Beam search moves beams between these rows. So a row holds the decoding steps computed there, not one final answer.

    Attributes:
        layers: Layers on the first axis.
        heads: Query heads on the heads axis.
        targets: Groups on the target axis, whose queries were recorded.
        sources: Groups on the source axis: all groups of the token map.

    Example:
        >>> from probes import record_attention
        >>> with torch.no_grad(), record_attention(model, tokens) as attention:
        ...     output = model(**inputs)
        >>> attention.mass.shape  # layers, batch, heads, targets, sources
        torch.Size([6, 1, 4, 4, 5])
        >>> attention.targets
        ('system', 'vision', 'instruction', 'response')
    """

    def __init__(
        self, tokens: TokenMap, layers: tuple[int, ...], heads: tuple[int, ...], targets: tuple[str, ...]
    ) -> None:
        self.layers, self.heads, self.targets, self.sources = layers, heads, targets, tokens.groups
        self._shape = tokens.labels.shape
        self._sums: dict[int, GroupSums] = {}
        # Rows and positions of the map that each layer has covered so far.
        self._covered: dict[int, tuple[int, int]] = {}

    @property
    def mass(self) -> Float[Tensor, "layers batch heads targets sources"]:
        """Return the mean of the total attention to `source`, from 0 to 1 (LLaVA-Mini, Figure 2, for each head).

        The masses of one query sum to 1 over the sources, or to less in models with attention sinks. The means sum to 1
        only if all queries of the target can attend to the same sources.

        Raises:
            RuntimeError: The model has not run the whole prompt inside `record_attention`.
        """
        return self._stack_layers("mass") / self._stack_layers("queries")[:, :, None]

    @property
    def entropy(self) -> Float[Tensor, "layers batch heads targets sources"]:
        """Return the mean entropy of the attention within `source`, renormalised to 1, in nats (LLaVA-Mini, Figure 3).

        Raises:
            RuntimeError: The model has not run the whole prompt inside `record_attention`.
        """
        return self._stack_layers("entropy") / self._stack_layers("queries")[:, :, None]

    @property
    def received(self) -> Float[Tensor, "layers batch heads targets positions"]:
        """Return the mean attention to each position, over the queries of `target` that can attend to this position.

        Raises:
            RuntimeError: The model has not run the whole prompt inside `record_attention`.
        """
        return self._stack_layers("received") / self._stack_layers("receivers")[:, :, None]

    @property
    def queries(self) -> Float[Tensor, "layers batch targets sources"]:
        """Return the number of queries of `target` that can attend to `source`.

        It depends on the layer, since sliding windows and interventions do.

        Raises:
            RuntimeError: The model has not run the whole prompt inside `record_attention`.
        """
        return self._stack_layers("queries")

    def frame(self) -> pd.DataFrame:
        """Return the record as a table.

        Returns:
            A row for each combination of layer, sample, head, target and source. The columns are layer, sample, head,
            target, source, mass, entropy, queries.

        Raises:
            RuntimeError: The model has not run the whole prompt inside `record_attention`.

        Example:
            >>> from probes import record_attention
            >>> with torch.no_grad(), record_attention(model, tokens, layers=[0]) as attention:
            ...     output = model(**inputs)
            >>> list(attention.frame().columns)
            ['layer', 'sample', 'head', 'target', 'source', 'mass', 'entropy', 'queries']
        """
        import pandas as pd

        mass = self.mass
        axes = [self.layers, range(mass.shape[1]), self.heads, self.targets, self.sources]
        index = pd.MultiIndex.from_product(axes, names=["layer", "sample", "head", "target", "source"])
        queries = self.queries[:, :, None].expand_as(mass)
        columns = {"mass": mass, "entropy": self.entropy, "queries": queries.long()}
        return pd.DataFrame({name: values.flatten().numpy() for name, values in columns.items()}, index).reset_index()

    def plot(self) -> Figure:
        """Plot mass and entropy by layer, with a panel for each target.

        Returns:
            The figure of `probes.plots.plot_attention`.
        """
        from probes.plots import plot_attention

        return plot_attention(self)

    def _stack_layers(self, name: str) -> Tensor:
        """Stack one field of the layers' sums along a first axis of layers.

        Raises:
            RuntimeError: The calls so far do not cover the token map.
        """
        if len(self._sums) < len(self.layers):
            raise RuntimeError("nothing was recorded: run a complete forward pass of the model inside record_attention")
        rows, positions = min(self._covered.values())
        if rows < self._shape[0] or positions < self._shape[1]:
            raise RuntimeError(
                f"the record is not complete: the model ran {rows} x {positions} of the token map's "
                f"{self._shape[0]} x {self._shape[1]} positions (batch x length)"
            )
        return torch.stack([getattr(self._sums[layer], name).cpu() for layer in self.layers])

    def _add(self, layer: int, window: TokenWindow, subset: CallSubset | None, keys: int, sums: GroupSums) -> None:
        """Add one call of one layer with `keys` keys: later positions of the same rows, or further rows."""
        sums = (
            sums.moved(window.first_key(keys), window.stop) if subset is None else sums.spread(subset.keys, window.stop)
        )
        rows, positions = self._covered.get(layer, (0, 0))
        has_further_rows = window.rows.start >= rows
        if layer in self._sums and not has_further_rows and window.start < positions:
            raise RuntimeError("a second prompt ran inside one record_attention: open one for each batch")
        # Rows whose call is shorter end in padding that no call covers.
        self._covered[layer] = window.rows.stop, self._shape[1] if window.padded else window.stop
        if layer in self._sums:
            before = self._sums[layer]
            sums = before.beside(sums) if has_further_rows else before + sums
        self._sums[layer] = sums


def query_and_key_groups(
    window: TokenWindow, subset: CallSubset | None, keys: int
) -> tuple[Int[Tensor, "batch queries"], Int[Tensor, "batch keys"]]:
    """Return the group of each query and of each key of a layer's call.

    Args:
        window: The positions of the token map that the call covers.
        subset: The tokens that the layer runs on; None if it runs on all tokens of the call.
        keys: Number of keys of the call.

    Returns:
        Group indices of the queries and of the keys. Filler and empty cache slots have -1.
    """
    if subset is None:
        return window.queries, window.keys(keys)
    queries = subset.select_queries(window.queries).masked_fill(subset.query_filler, -1)
    return queries, window.labels.gather(1, subset.keys).masked_fill(subset.key_filler, -1)
