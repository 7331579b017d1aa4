"""Reference attention statistics, computed from full attention matrices one query at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from probes import TokenMap

Inputs = dict[str, torch.Tensor]


def expected_statistics(
    attentions: Sequence[torch.Tensor], tokens: TokenMap, targets: Sequence[str], visible: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Return mass, entropy, query counts and received attention, as the paper defines them.

    Args:
        attentions: Attention weights of each layer `[batch, heads, queries, keys]`.
        tokens: Token map of the call.
        targets: Groups of the queries.
        visible: Visible edges `[batch, queries, keys]`; causal without padding by default.
    """
    weights = np.stack([layer.float().numpy() for layer in attentions])
    layers, batch, heads, queries, keys = weights.shape
    labels = tokens.labels.numpy()
    if visible is None:
        visible = np.tril(np.ones((queries, keys), dtype=bool)) & (labels != tokens.index("pad"))[:, None]
    shape = (layers, batch, heads, len(targets), len(tokens.groups))
    mass, entropy = np.full(shape, np.nan), np.full(shape, np.nan)
    count = np.zeros((layers, batch, len(targets), len(tokens.groups)))
    received = np.full((*shape[:-1], keys), np.nan)
    for index in np.ndindex(shape):
        layer, sample, head, target, source = index
        in_source = labels[sample] == source
        masses, entropies = [], []
        for query in np.flatnonzero(labels[sample] == tokens.index(targets[target])):
            visible_sources = in_source & visible[sample, query]
            if visible_sources.any():
                part = weights[layer, sample, head, query, visible_sources].astype(np.float64)
                share = part / part.sum()
                masses.append(part.sum())
                entropies.append(-(share * np.log(share)).sum())
        if masses:
            mass[index], entropy[index] = np.mean(masses), np.mean(entropies)
        count[layer, sample, target, source] = len(masses)
    for index in np.ndindex(received.shape):
        layer, sample, head, target, position = index
        in_target = labels[sample] == tokens.index(targets[target])
        attending = in_target & visible[sample, :, position]
        if attending.any():
            received[index] = weights[layer, sample, head, attending, position].mean()
    return {"mass": mass, "entropy": entropy, "queries": count, "received": received}


def check_record(record: Any, expected: dict[str, np.ndarray], atol: float = 1e-5) -> None:
    """Check that the statistics of a record equal the expected ones."""
    for name, values in expected.items():
        actual = getattr(record, name)
        assert actual.dtype == torch.float32
        np.testing.assert_allclose(actual.numpy(), values, atol=atol, rtol=0, err_msg=name)


def label_responses(inputs: Inputs, responses: int = 2) -> Inputs:
    """Return the inputs with `labels` that mark each row's last tokens as response."""
    last = inputs["attention_mask"].flip(1).cumsum(1).flip(1) <= responses
    response = last & (inputs["attention_mask"] == 1)
    return inputs | {"labels": inputs["input_ids"].masked_fill(~response, -100)}
