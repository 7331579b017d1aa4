"""Compressors without parameters: pooling, merging and samples of patches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_mini.compressors.uniform import move
from tests.llava_mini.compress import build, inputs

FEATURES = inputs(build("average"))["features"]


def cell(i: int, side: int, size: int) -> range:
    """Rows (or columns) of the i-th of `size` cells of adaptive pooling."""
    return range(math.floor(i * side / size), math.ceil((i + 1) * side / size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_average_is_adaptive_pooling(size):
    expected = torch.nn.functional.adaptive_avg_pool2d(FEATURES.transpose(1, 2).unflatten(2, (6, 6)), size)
    torch.testing.assert_close(build("average", size)(FEATURES)[0], expected.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("name", ["average", "conv", "random", "token_packer", "tome", "uniform"])
def test_no_more_tokens_than_patches(name):
    with pytest.raises(ValueError, match="compressor_size=7 exceeds the 6 x 6 grid"):
        build(name, 7)(FEATURES)


@pytest.mark.parametrize(
    ("size", "places"),
    [
        (1, [21]),
        (2, [7, 10, 25, 28]),
        (3, [7, 9, 11, 19, 21, 23, 31, 33, 35]),
        (4, [0, 2, 3, 5, 12, 14, 15, 17, 18, 20, 21, 23, 30, 32, 33, 35]),
        (6, list(range(36))),
    ],
)
def test_uniform_takes_the_middles(size, places):
    tokens, weights = build("uniform", size)(FEATURES)
    assert torch.equal(tokens, FEATURES[:, places])
    assert torch.equal(weights, torch.eye(36)[places].expand(3, -1, -1))


@given(st.integers(1, 30), st.data())
def test_middles_lie_in_their_cells(side, data):
    size = data.draw(st.integers(1, side))
    places = move(torch.arange(size**2), size, side).tolist()
    assert len(set(places)) == size**2
    for number, place in enumerate(places):
        for i, x in zip(divmod(number, size), divmod(place, side), strict=True):
            inside = cell(i, side, size)
            assert x in inside
            assert abs(2 * x + 1 - (inside.start + inside.stop)) <= 2  # no other is nearer to the middle by a patch


@pytest.mark.parametrize("seed", [0, 5])
def test_random_takes_what_chance_has_fixed(seed):
    torch.manual_seed(seed)
    order = torch.randperm(36)
    for size in (1, 3, 6):
        places = sorted(order[: size**2].tolist())
        tokens, weights = build("random", size, seed=seed)(FEATURES)
        assert torch.equal(tokens, FEATURES[:, places])
        assert torch.equal(weights, torch.eye(36)[places].expand(3, -1, -1))


def test_random_takes_the_same_places_of_a_picture_in_tiles():
    compressor = build("random", 3)
    fine = torch.randn(1, 4 * 36, 32, generator=torch.Generator().manual_seed(2))
    grid = fine.unflatten(1, (12, 12))
    expected = [grid[0, 2 * (p // 6) + 1, 2 * (p % 6) + 1] for p in sorted(compressor.order[:9].tolist())]
    assert torch.equal(compressor(fine)[0][0], torch.stack(expected))


@pytest.mark.parametrize("side", [1, 4, 5, 6, 7, 12])
def test_random_on_another_grid_takes_each_patch_once(side):
    """As a list would be gone through: the patch that holds the middle of the next place, unless it was taken."""
    fine = torch.randn(1, side**2, 32, generator=torch.Generator().manual_seed(2))
    drawn = build("random").order.tolist()
    middles = [side * math.floor((p // 6 + 0.5) * side / 6) + math.floor((p % 6 + 0.5) * side / 6) for p in drawn]
    taken = list(dict.fromkeys(middles))
    for size in range(1, min(side, 6) + 1):
        tokens, weights = build("random", size)(fine)
        assert torch.equal(tokens, fine[:, sorted(taken[: size**2])])
        assert torch.equal(weights[0].argmax(-1), torch.tensor(sorted(taken[: size**2])))


def test_random_names_a_grid_that_is_too_small():
    with pytest.raises(ValueError, match="compressor_size=3 exceeds the 2 x 2 grid"):
        build("random", 3)(FEATURES[:, :4])
    with pytest.raises(ValueError, match="compressor_size=7 exceeds the 6 x 6 grid"):
        build("random", 7)(torch.zeros(1, 144, 32))


def merged_by_hand(features: torch.Tensor, tokens: int) -> list[list[int]]:
    """The patches of each token of one picture, by loops over lists."""
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
def test_merging_is_bipartite_soft_matching(side, seed, data):
    size = data.draw(st.integers(1, side))
    features = torch.randn(2, side**2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tokens, weights = build("tome", size)(features)
    for picture, token, weight in zip(features, tokens, weights, strict=True):
        groups = merged_by_hand(picture.float(), size**2)
        expected = torch.zeros_like(weight)
        for number, group in enumerate(groups):
            expected[number, group] = 1 / len(group)
        torch.testing.assert_close(weight, expected)
        torch.testing.assert_close(token, torch.stack([picture[group].mean(0) for group in groups]))


def test_merging_of_nine_directions():
    """Worked out on paper. Round one: 0-1 and 6-7 are 10 degrees apart, 2-3 5, 4-5 20; 8 is 40 from 1, and one too many
    as four pairs merge. Round two, by the means 5, 97.5, 190, 295 and 50: 8 goes to 2-3, 47.5 degrees away."""
    degrees = torch.tensor([0, 10, 100, 95, 200, 180, 300, 290, 50])
    features = torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], dim=-1)[None]
    _, weights = build("tome", 2)(features)
    assert [row.nonzero().flatten().tolist() for row in weights[0]] == [[0, 1], [2, 3, 8], [4, 5], [6, 7]]


def test_merging_equal_patches_is_settled_by_their_order():
    _, weights = build("tome", 2)(torch.ones(1, 9, 4))
    assert [row.nonzero().flatten().tolist() for row in weights[0]] == merged_by_hand(torch.ones(9, 4), 4)
