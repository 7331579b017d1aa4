from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from probes.pruning import sparsevlm
from probes.pruning.token_recycling import recycle_tokens
from probes.tokens.token_map import TokenMap
from tests.probes import reference_llama
from tests.probes.pruning.rows import TEXTS, assert_rows_independent, embed, removed_in, unpadded_row

Inputs = dict[str, Tensor]


def raters_by_loops(states: np.ndarray, vision: list[int], question: list[int]) -> list[int]:
    relevance = dict.fromkeys(question, 0.0)
    for v in vision:
        products = np.array([states[v] @ states[t] for t in question])
        shares = np.exp(products - products.max()) / np.exp(products - products.max()).sum()
        for t, share in zip(question, shares, strict=True):
            relevance[t] += share / len(vision)
    mean = sum(relevance.values()) / max(len(relevance), 1)
    return [t for t in question if relevance[t] >= mean - 1e-12]


def clusters_by_loops(states: np.ndarray, pool: list[int], count: int) -> dict[int, list[int]]:
    """Return the members of each cluster by its centre."""
    distance = {(i, j): math.dist(states[i], states[j]) for i in pool for j in pool}
    density = {}
    for i in pool:
        squares = sorted(distance[i, j] ** 2 for j in pool if j != i)[:5]
        density[i] = math.exp(-sum(squares) / max(len(squares), 1) / states.shape[1])
    score = {}
    for i in pool:
        higher = [j for j in pool if density[j] > density[i] or (density[j] == density[i] and j < i)]
        others = [distance[i, j] for j in pool if j != i]
        score[i] = density[i] * (min(distance[i, j] for j in higher) if higher else max(others, default=0.0))
    centres = sorted(pool, key=lambda i: -score[i])[:count]
    members: dict[int, list[int]] = {centre: [] for centre in centres}
    for i in pool:
        members[i if i in centres else min(sorted(centres), key=lambda c: distance[i, c])].append(i)
    return members


class ReferenceSparseVlm:
    """SparseVLM on one unpadded row, by plain tensor operations and loops."""

    def __init__(self, model: Any, inputs: Inputs, text: tuple[int, int, int], layers: list[int], keep: Any) -> None:
        before, visual, after = text
        self.layers, self.keep, self.visual = layers, keep, visual
        self.left = list(range(before, before + visual))
        question = list(range(before + visual, before + visual + after)) if visual else []
        hidden = embed(model, inputs)["inputs_embeds"]
        self.raters = raters_by_loops(hidden[0].double().numpy(), self.left, question) if visual else []
        self.edges: dict[int, Tensor] = {}
        self.removed: list[Tensor] = []
        self.everything = list(self.left)
        self.logits, _ = reference_llama.run_decoder(model, hidden, self.edges, self.read_weights, self.patch)

    def read_weights(self, layer: int, weights: Tensor) -> None:
        self.weights = weights[0].mean(dim=0).double().numpy()

    def patch(self, layer: int, component: str, states: Tensor) -> Tensor:
        if component != "residual":
            return states
        if layer + 1 in self.layers and self.visual:
            states = self.drop(layer, states)
        if self.removed:
            self.edges[layer + 1] = self.removed[-1][None].expand(len(self.removed[-1]), -1)
        return states

    def drop(self, layer: int, states: Tensor) -> Tensor:
        stage = self.layers.index(layer + 1) + 1
        if self.keep == "rank":
            matrix = self.weights[np.ix_(self.raters, self.left)]
            asked = int(np.linalg.matrix_rank(matrix.astype(np.float32))) if matrix.size else 0
        else:
            asked = math.floor(self.keep**stage * self.visual + 1e-6)
        score = {v: sum(self.weights[t, v] for t in self.raters) for v in self.left}
        order = sorted(self.left, key=lambda v: -score[v])
        dropped = len(order) - asked
        recycled = min(max(1, round(0.03 * dropped)), asked - 1) if 1 < asked < len(order) else 0
        kept, others = order[: asked - recycled], order[asked - recycled :]
        pool = sorted(others[: max(math.floor(0.3 * len(others) + 1e-6), recycled)])
        values = states.clone()
        if recycled:
            members = clusters_by_loops(states[0].double().numpy(), pool, recycled)
            for centre, cluster in members.items():
                values[0, centre] = states[0, cluster].sum(dim=0)
            kept = kept + list(members)
        self.left = sorted(kept)
        removed = torch.zeros(states.shape[1], dtype=torch.bool)
        removed[[v for v in self.everything if v not in kept]] = True
        self.removed.append(removed)
        return values


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["mask", "drop"])
@pytest.mark.parametrize(
    ("layers", "keep"), [([1], 0.5), ([2], 0.25), ([1, 2], 0.6), ([1, 2], "rank"), ([1], 0.0), ([1, 2], 0.95)]
)
def test_sparsevlm_equals_loops_on_the_reference_decoder(
    make_llama: Callable[..., Any],
    rows: Callable[[str], Inputs],
    side: str,
    implementation: str,
    how: Any,
    layers: list[int],
    keep: Any,
) -> None:
    inputs, model = rows(side), make_llama(implementation)
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), sparsevlm(model, tokens, layers, keep, how=how) as receipt:
        logits = model(**embed(model, inputs)).logits
    vision = tokens.mask("vision")
    for row, text in enumerate(TEXTS):
        real = inputs["attention_mask"][row].bool()
        if not text[1] or not text[2]:  # without raters all scores are equal
            continue
        reference = ReferenceSparseVlm(model, unpadded_row(inputs, row), text, layers, keep)
        for effect, removed in zip(receipt, reference.removed, strict=True):
            assert torch.equal(effect.chosen[row, real], removed), f"row {row}"
        remaining = ~reference.removed[-1]
        torch.testing.assert_close(logits[row, real][remaining], reference.logits[remaining], atol=5e-5, rtol=1e-4)
    if keep != "rank":
        for stage, effect in enumerate(receipt, 1):
            asked = [math.floor(keep**stage * visual + 1e-6) for _, visual, _ in TEXTS]
            assert (vision & ~effect.chosen).sum(dim=1).tolist() == asked


def test_sparsevlm_row_in_batch_equals_row_alone(make_llama: Callable[..., Any], rows: Callable[[str], Inputs]) -> None:
    assert_rows_independent(make_llama(), rows("left"), lambda model, tokens: sparsevlm(model, tokens, [1, 2], 0.6))


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_recycle_tokens_equals_loops(count: int) -> None:
    """Three rows of 30 positions, with 12, 20 and no tokens to cluster."""
    generator = torch.Generator().manual_seed(count)
    states = torch.randn(3, 30, 6, generator=generator)
    pool = torch.zeros(3, 30, dtype=torch.bool)
    pool[0, 3:27:2] = pool[1, 5:25] = True
    clusters = torch.tensor([[count], [count], [0]])
    merged, centres = recycle_tokens(states, pool, clusters)
    for row in range(2):
        members = clusters_by_loops(states[row].double().numpy(), pool[row].nonzero()[:, 0].tolist(), count)
        assert sorted(members) == centres[row].nonzero()[:, 0].tolist()
        expected = states[row].clone()
        for centre, cluster in members.items():
            expected[centre] = states[row, cluster].sum(dim=0)
        torch.testing.assert_close(merged[row], expected)
    assert torch.equal(merged[2], states[2])
    assert not centres[2].any()


@pytest.mark.parametrize("how", ["mask", "drop"])
def test_sparsevlm_of_full_rank_drops_nothing(make_llava: Callable[..., Any], make_rows: Any, how: Any) -> None:
    """With 20 words for 4 patches, the rank of their attention is 4. Nothing is dropped, and the receipt says so."""
    model, inputs = make_llava(), make_rows([(2, 4, 20)], "left")
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad():
        with sparsevlm(model, tokens, [1], "rank", how=how) as receipt:
            logits = model(**inputs).logits
        torch.testing.assert_close(logits, model(**inputs).logits)
    assert not receipt[0].chosen.any()
    assert (receipt[0].calls, receipt[0].tokens) == ({1: 1, 2: 1}, {1: 0, 2: 0})


def test_recycle_tokens_of_equal_tokens_keeps_their_sum() -> None:
    """Two groups of equal tokens become two tokens, each the sum of its group."""
    states = torch.cat([torch.ones(1, 4, 3), -torch.ones(1, 6, 3)], dim=1)
    merged, centres = recycle_tokens(states, torch.ones(1, 10, dtype=torch.bool), torch.tensor([[2]]))
    assert sorted(merged[centres][:, 0].tolist()) == [-6, 4]


def test_sparsevlm_in_generation_with_beams_gives_same_logits_by_mask_and_drop(
    make_llama: Callable[..., Any], rows: Callable[[str], Inputs]
) -> None:
    inputs, model = rows("left"), make_llama()
    tokens = TokenMap.from_inputs(model, inputs)
    logits = []
    for how in ("mask", "drop"):
        with sparsevlm(model, tokens, [1, 2], 0.5, how=how) as receipt:  # type: ignore[arg-type]
            out = model.generate(
                **inputs,
                max_new_tokens=3,
                do_sample=False,
                num_beams=2,
                output_logits=True,
                return_dict_in_generate=True,
            )
        assert all(set(effect.calls.values()) == {3} for effect in receipt), "the prompt and two decoding steps"
        logits.append(torch.stack(out.logits))
    torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("layers", "keep", "message"),
    [([0, 1], 0.5, r"\[0, 1\]"), ([2, 1], 0.5, r"\[2, 1\]"), ([3], 0.5, "3"), ([1], 1.0, r"keep=1\.0")],
)
def test_sparsevlm_with_invalid_arguments_raises(
    make_llama: Callable[..., Any], rows: Callable[[str], Inputs], layers: list[int], keep: float, message: str
) -> None:
    model, inputs = make_llama(), rows("left")
    with pytest.raises(ValueError, match=message):
        removed_in(model, inputs, lambda model, tokens: sparsevlm(model, tokens, layers, keep))
