"""The record of attention between token groups, with the statistics that can be read from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.attention.group_sums import DEFAULT_STATISTICS, GroupSums
from probes.hooks.partial_call import CallSubset
from probes.hooks.token_window import TokenWindow
from probes.optional_packages import require_package
from probes.tokens.token_map import TokenMap

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from probes.view.page import AttentionView
    from probes.view.run_data import ViewRun
    from probes.view.words import Words


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
        statistics: Statistics that were recorded. Reading another one raises RuntimeError.
        tokens: The token map.
        target_tokens: The token map that `targets` are groups of: with words, one in which each is a group of its own.
        words: The words that `view` shows, or None.
        facts: Facts of the model that `view` shows: its type, device and dtype.

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
        self,
        tokens: TokenMap,
        layers: tuple[int, ...],
        heads: tuple[int, ...],
        targets: tuple[str, ...],
        words: Words | None = None,
        statistics: tuple[str, ...] = DEFAULT_STATISTICS,
    ) -> None:
        self.tokens, self.words, self.facts = tokens, words, dict[str, str]()
        self.target_tokens = tokens if words is None else words.label(tokens)
        self.layers, self.heads, self.targets, self.sources = layers, heads, targets, tokens.groups
        self.statistics = statistics
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
        return self._mean("mass", "queries")

    @property
    def entropy(self) -> Float[Tensor, "layers batch heads targets sources"]:
        """Return the mean entropy of the attention within `source`, renormalised to 1, in nats (LLaVA-Mini, Figure 3).

        Raises:
            RuntimeError: The model has not run the whole prompt inside `record_attention`.
        """
        return self._mean("entropy", "queries")

    @property
    def contribution(self) -> Float[Tensor, "layers batch heads targets sources"]:
        """Return the mean norm of what `source` adds to the output of the attention module.

        For query q, head h and source S it is || sum over k in S of a_qk v_k W_h ||, with attention a, values v and the
        head's output projection W (Kobayashi et al. 2020, "Attention is not only a weight", arXiv 2004.10102, whose
        norms are of single keys). A gate of the head's output is part of it. Norms, factors and biases after the
        projection are not. Unlike mass, it is small for a source that is attended to but has small values.

        Raises:
            RuntimeError: It was not recorded, or the model has not run the whole prompt inside `record_attention`.

        Example:
            >>> from probes import record_attention
            >>> with torch.no_grad(), record_attention(model, tokens, statistics=["contribution"]) as attention:
            ...     output = model(**inputs)
            >>> attention.contribution.shape  # layers, batch, heads, targets, sources
            torch.Size([6, 1, 4, 4, 5])
        """
        return self._mean("contribution", "queries")

    @property
    def received(self) -> Float[Tensor, "layers batch heads targets positions"]:
        """Return the mean attention to each position, over the queries of `target` that can attend to this position.

        Raises:
            RuntimeError: The model has not run the whole prompt inside `record_attention`.
        """
        return self._mean("received", "receivers")

    @property
    def sink_rate(self) -> Float[Tensor, "layers batch heads targets positions"]:
        """Return for which share of the queries of `target` a position's attention stands out in its group.

        It stands out if it is at least 10 times that of the group's median position, and an outlier among the scores of
        the group's positions (`probes.attention.outliers`). `probes.attention.sinks.find_sinks` reads it. Only queries
        that can attend to the position count.

        Raises:
            RuntimeError: It was not recorded, or the model has not run the whole prompt inside `record_attention`.
        """
        return self._mean("sink_rate", "receivers")

    @property
    def value_norm(self) -> Float[Tensor, "layers batch heads positions"]:
        """Return the norm of the value at each position, of the key head that each head uses.

        Attention sinks have small values (Gu et al. 2024, arXiv 2410.10781). A position that a layer runs without is NaN.

        Raises:
            RuntimeError: It was not recorded, or the model has not run the whole prompt inside `record_attention`.
        """
        return self._mean("value_norm", "value_calls")

    @property
    def queries(self) -> Float[Tensor, "layers batch targets sources"]:
        """Return the number of queries of `target` that can attend to `source`.

        It depends on the layer, since sliding windows and interventions do.

        Raises:
            RuntimeError: The model has not run the whole prompt inside `record_attention`.
        """
        return self._stack_layers("queries")

    @property
    def receivers(self) -> Float[Tensor, "layers batch targets positions"]:
        """Return the number of queries of `target` that can attend to each position.

        Raises:
            RuntimeError: The model has not run the whole prompt inside `record_attention`.
        """
        return self._stack_layers("receivers")

    def frame(self) -> pd.DataFrame:
        """Return the record as a table.

        Returns:
            A row for each combination of layer, sample, head, target and source. The columns are layer, sample, head,
            target, source, those recorded of mass, entropy and contribution, and queries.

        Raises:
            RuntimeError: The model has not run the whole prompt inside `record_attention`.

        Example:
            >>> from probes import record_attention
            >>> with torch.no_grad(), record_attention(model, tokens, layers=[0]) as attention:
            ...     output = model(**inputs)
            >>> list(attention.frame().columns)
            ['layer', 'sample', 'head', 'target', 'source', 'mass', 'entropy', 'queries']
        """
        require_package("pandas", "AttentionRecord.frame")
        import pandas as pd

        names = ("mass", "entropy", "contribution")
        columns = {name: getattr(self, name) for name in names if name in self.statistics}
        counts = self.queries[:, :, None].expand(-1, -1, len(self.heads), -1, -1)
        axes = [self.layers, range(counts.shape[1]), self.heads, self.targets, self.sources]
        index = pd.MultiIndex.from_product(axes, names=["layer", "sample", "head", "target", "source"])
        columns["queries"] = counts.long()
        return pd.DataFrame({name: values.flatten().numpy() for name, values in columns.items()}, index).reset_index()

    def plot(self) -> Figure:
        """Plot mass and entropy by layer, with a panel for each target.

        Returns:
            The figure of `probes.plots.plot_attention`.
        """
        from probes.plots import plot_attention

        return plot_attention(self)

    def view(self, images: Sequence[Any] = (), name: str = "", title: str = "") -> AttentionView:
        """Return a page that shows what each word attends to. Jupyter displays it; `save` writes it to a file.

        Args:
            images: The images of the prompt in reading order; a video is a list of its frames.
            name: Name of the run on the page; by default the model's type.
            title: Title of the page.

        Raises:
            ValueError: If the record was made without `words`.
            RuntimeError: The model has not run the whole prompt inside `record_attention`.

        Example:
            >>> from probes import record_attention
            >>> from probes.view import find_words
            >>> words = find_words(tokens, inputs["input_ids"], processor.tokenizer)
            >>> with torch.no_grad(), record_attention(model, tokens, words=words) as attention:
            ...     output = model(**inputs)
            >>> attention.view(images=[image]).save(folder / "page.html").exists()
            True
        """
        from probes.view.page import AttentionView

        return AttentionView([self.view_run(images, name)], title)

    def view_run(self, images: Sequence[Any] = (), name: str = "", **parts: Any) -> ViewRun:
        """Return what a page shows of this record, for `probes.view.AttentionView`.

        Args:
            images: The images of the prompt in reading order; a video is a list of its frames.
            name: Name of the run on the page; by default the model's type.
            **parts: Further arguments of `ViewRun`. `maps` are added to the attention.

        Raises:
            ValueError: If the record was made without `words`, or some of them were not recorded.
            RuntimeError: The model has not run the whole prompt inside `record_attention`.
        """
        from probes.view.run_data import PatchMap, ViewRun

        if self.words is None:
            raise ValueError("view: the record has no words; pass words=find_words(...) to record_attention")
        if missing := [group for group in self.words.groups if group not in self.targets]:
            raise ValueError(f"targets: {missing[0]!r} was not recorded; name all groups of the words")
        targets = [self.targets.index(group) for group in self.words.groups]
        vision = self.tokens.mask("vision")[0].cpu()
        keys = self.receivers[:, 0, targets]  # layers, words, positions
        received = self.received[:, 0, :, targets]  # layers, heads, words, positions
        own_maps = [PatchMap("attention", "attention", "share of the word's attention", received)]
        if "value_norm" in self.statistics:
            weighted = received * self.value_norm[:, 0, :, None]
            own_maps.append(PatchMap("value", "attention times value norm", "share times norm", weighted))
        return ViewRun(
            name=name or self.facts.get("model", "model"),
            model=self.facts,
            tokens=self.tokens,
            words=self.words,
            layers=self.layers,
            heads=self.heads,
            mass=self.mass[:, 0][:, :, targets, self.sources.index("vision")],
            uniform=keys[..., vision].sum(-1) / keys.sum(-1),
            maps=[*own_maps, *parts.pop("maps", ())],
            images=images,
            **parts,
        )

    def _mean(self, name: str, count: str) -> Tensor:
        """Return the sums of one statistic over their counts.

        Raises:
            RuntimeError: It was not recorded, or the calls so far do not cover the token map.
        """
        if name not in self.statistics:
            raise RuntimeError(
                f"{name} was not recorded, only {', '.join(self.statistics)}: name it in statistics of record_attention"
            )
        return self._stack_layers(name) / self._stack_layers(count)[:, :, None]

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
    window: TokenWindow, target_tokens: TokenMap, subset: CallSubset | None, keys: int
) -> tuple[Int[Tensor, "batch queries"], Int[Tensor, "batch keys"]]:
    """Return the group of each query and of each key of a layer's call.

    Args:
        window: The positions of the token map that the call covers.
        target_tokens: The map whose groups the queries have; the keys have those of the window's map.
        subset: The tokens that the layer runs on; None if it runs on all tokens of the call.
        keys: Number of keys of the call.

    Returns:
        Group indices of the queries and of the keys. Filler and empty cache slots have -1.
    """
    queries = window.labels_by(target_tokens)[:, window.start :]
    if subset is None:
        return queries, window.keys(keys)
    subset = subset.to(queries.device)
    queries = subset.select_queries(queries).masked_fill(subset.query_filler, -1)
    return queries, window.labels.gather(1, subset.keys).masked_fill(subset.key_filler, -1)
