"""Test compressors without parameters: pooling, merging and sampling of patches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_mini.compressors.uniform import rescale_grid_indices
from tests.llava_mini.compress import build, random_inputs

FEATURES = random_inputs(build("average"))["features"]


def cell_range(i: int, side: int, size: int) -> range:
    """Return the rows (or columns) of the i-th of `size` cells of adaptive pooling."""
    return range(math.floor(i * side / size), math.ceil((i + 1) * side / size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_average_equals_torch_adaptive_pooling(size):
    expected = torch.nn.functional.adaptive_avg_pool2d(FEATURES.transpose(1, 2).unflatten(2, (6, 6)), size)
    torch.testing.assert_close(build("average", size)(FEATURES)[0], expected.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("name", ["average", "conv", "random", "token_packer", "tome", "uniform"])
def test_compressor_more_tokens_than_patches_raises(name):
    with pytest.raises(ValueError, match="compressor_size=7 exceeds the 6 x 6 grid"):
        build(name, 7)(FEATURES)


@pytest.mark.parametrize(
    ("size", "indices"),
    [
        (1, [21]),
        (2, [7, 10, 25, 28]),
        (3, [7, 9, 11, 19, 21, 23, 31, 33, 35]),
        (4, [0, 2, 3, 5, 12, 14, 15, 17, 18, 20, 21, 23, 30, 32, 33, 35]),
        (6, list(range(36))),
    ],
)
def test_uniform_returns_cell_middles(size, indices):
    tokens, weights = build("uniform", size)(FEATURES)
    assert torch.equal(tokens, FEATURES[:, indices])
    assert torch.equal(weights, torch.eye(36)[indices].expand(3, -1, -1))


@given(st.integers(1, 30), st.data())
def test_rescale_grid_indices_are_distinct_middles_of_cells(side, data):
    size = data.draw(st.integers(1, side))
    indices = rescale_grid_indices(torch.arange(size**2), size, side).tolist()
    assert len(set(indices)) == size**2
    for cell, index in enumerate(indices):
        for i, x in zip(divmod(cell, size), divmod(index, side), strict=True):
            inside = cell_range(i, side, size)
            assert x in inside
            assert abs(2 * x + 1 - (inside.start + inside.stop)) <= 2  # at most one patch from the middle of the cell


@pytest.mark.parametrize("seed", [0, 5])
def test_random_returns_first_patches_of_permutation(seed):
    torch.manual_seed(seed)
    order = torch.randperm(36)
    for size in (1, 3, 6):
        indices = sorted(order[: size**2].tolist())
        tokens, weights = build("random", size, seed=seed)(FEATURES)
        assert torch.equal(tokens, FEATURES[:, indices])
        assert torch.equal(weights, torch.eye(36)[indices].expand(3, -1, -1))


def test_random_image_in_tiles_returns_same_positions():
    compressor = build("random", 3)
    fine = torch.randn(1, 4 * 36, 32, generator=torch.Generator().manual_seed(2))
    grid = fine.unflatten(1, (12, 12))
    expected = [grid[0, 2 * (p // 6) + 1, 2 * (p % 6) + 1] for p in sorted(compressor.order[:9].tolist())]
    assert torch.equal(compressor(fine)[0][0], torch.stack(expected))


@pytest.mark.parametrize("side", [1, 4, 5, 6, 7, 12])
def test_random_on_another_grid_returns_each_patch_once(side):
    """Go through the drawn positions in order; take the patch at the middle of each unless it was taken."""
    fine = torch.randn(1, side**2, 32, generator=torch.Generator().manual_seed(2))
    drawn = build("random").order.tolist()
    middles = [side * math.floor((p // 6 + 0.5) * side / 6) + math.floor((p % 6 + 0.5) * side / 6) for p in drawn]
    taken = list(dict.fromkeys(middles))
    for size in range(1, min(side, 6) + 1):
        tokens, weights = build("random", size)(fine)
        assert torch.equal(tokens, fine[:, sorted(taken[: size**2])])
        assert torch.equal(weights[0].argmax(-1), torch.tensor(sorted(taken[: size**2])))


def test_random_grid_too_small_raises():
    with pytest.raises(ValueError, match="compressor_size=3 exceeds the 2 x 2 grid"):
        build("random", 3)(FEATURES[:, :4])
    with pytest.raises(ValueError, match="compressor_size=7 exceeds the 6 x 6 grid"):
        build("random", 7)(torch.zeros(1, 144, 32))


def merge_by_loops(features: torch.Tensor, tokens: int) -> list[list[int]]:
    """Return the patches of each token of one image, by loops over lists."""
    groups = [[i] for i in range(len(features))]
    while len(groups) > tokens:
        means = [features[group].mean(0) for group in groups]
        means = [mean / mean.norm() for mean in means]
        pairs = []
        for a in range(0, len(groups), 2):
            b = max(range(1, len(groups), 2), key=lambda b: float(means[a] @ means[b]))
            pairs.append((float(means[a] @ means[b]), a, b))
        pairs.sort(key=lambda pair: -pair[0])
        for _, a, b in pairs[: min(len(groups) - tokens, len(groups) // 2)]:
            groups[b] = groups[b] + groups[a]
            groups[a] = []
        groups = sorted(sorted(group) for group in groups if group)
    return groups


@settings(max_examples=40)
@given(st.integers(1, 7), st.integers(0, 10_000), st.data())
def test_tome_equals_loops_of_bipartite_soft_matching(side, seed, data):
    size = data.draw(st.integers(1, side))
    features = torch.randn(2, side**2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tokens, weights = build("tome", size)(features)
    for image, token, weight in zip(features, tokens, weights, strict=True):
        groups = merge_by_loops(image.float(), size**2)
        expected = torch.zeros_like(weight)
        for index, group in enumerate(groups):
            expected[index, group] = 1 / len(group)
        torch.testing.assert_close(weight, expected)
        torch.testing.assert_close(token, torch.stack([image[group].mean(0) for group in groups]))


def test_tome_nine_directions_gives_worked_groups():
    """Nine directions, worked out on paper.

    Round one merges four pairs: 0-1 and 6-7 are 10 degrees apart, 2-3 are 5 and 4-5 are 20. Patch 8 is 40 degrees from
    patch 1, which makes a fifth pair. Round two has the means 5, 97.5, 190, 295 and 50: 8 joins 2-3, 47.5 degrees away.
    """
    degrees = torch.tensor([0, 10, 100, 95, 200, 180, 300, 290, 50])
    features = torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], dim=-1)[None]
    _, weights = build("tome", 2)(features)
    assert [row.nonzero().flatten().tolist() for row in weights[0]] == [[0, 1], [2, 3, 8], [4, 5], [6, 7]]


def test_tome_equal_patches_merge_in_order():
    _, weights = build("tome", 2)(torch.ones(1, 9, 4))
    assert [row.nonzero().flatten().tolist() for row in weights[0]] == merge_by_loops(torch.ones(9, 4), 4)
