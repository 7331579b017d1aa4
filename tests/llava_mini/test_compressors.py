"""The contract of every registered compressor."""

from __future__ import annotations

import pytest
import torch

from llava_mini.compressors import COMPRESSORS, register
from tests.llava_mini.compress import build, inputs

every_compressor = pytest.mark.parametrize("name", sorted(COMPRESSORS))

# Sizes up to that of the grid, 6 x 6, that a method has no use for.
REFUSED = {"pixel_shuffle": (4,)}


@every_compressor
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("training", [False, True])
def test_ask_n_get_n(name, size, training):
    if size in REFUSED.get(name, ()):
        with pytest.raises(ValueError, match=f"compressor_size={size} .*; it may be") as error:
            build(name, size)
        assert "\n" not in str(error.value)
        return
    compressor = build(name, size).train(training)
    tokens, weights = compressor(**inputs(compressor))
    assert tokens.shape == (3, size**2, 32)
    assert weights.shape == (3, size**2, 36)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, size**2))
    assert (weights >= 0).all()
    assert tokens.isfinite().all()


@every_compressor
@pytest.mark.parametrize("size", [1, 3])
def test_permuting_the_batch_permutes_the_result(name, size):
    compressor, order = build(name, size), torch.tensor([2, 0, 1])
    given = inputs(compressor)
    shuffled = {key: value[order] for key, value in given.items()}
    for permuted, result in zip(compressor(**shuffled), compressor(**given), strict=True):
        torch.testing.assert_close(permuted, result[order])


@every_compressor
def test_images_do_not_mix(name):
    """Norms over the batch would pass the test above."""
    compressor = build(name, 3)
    given = inputs(compressor)
    other = {
        key: torch.cat([value[1:2] if key == "text_mask" else value[1:2] * 3, value[1:]])
        for key, value in given.items()
    }
    for changed, result in zip(compressor(**other), compressor(**given), strict=True):
        torch.testing.assert_close(changed[1:], result[1:])


@every_compressor
def test_a_fixed_tensor_gives_a_fixed_result(name):
    compressor = build(name, 3)
    torch.manual_seed(1)
    first = compressor(**inputs(compressor))
    torch.manual_seed(2)
    for one, other in zip(first, compressor(**inputs(compressor)), strict=True):
        assert torch.equal(one, other)


@every_compressor
def test_gradients_reach_every_parameter_and_the_patches_that_have_weight(name):
    compressor = build(name)
    given = inputs(compressor)
    given["features"].requires_grad_()
    tokens, weights = compressor(**given)
    (tokens * torch.randn(tokens.shape)).sum().backward()
    assert torch.equal((given["features"].grad != 0).any(-1), (weights > 0).any(1))
    unreached = [key for key, p in compressor.named_parameters() if p.grad is None or not p.grad.any()]
    assert unreached == []


@every_compressor
def test_half_precision(name):
    compressor = build(name).to(torch.bfloat16)
    given = {key: v.to(torch.bfloat16) if v.is_floating_point() else v for key, v in inputs(compressor).items()}
    for result in compressor(**given):
        assert result.dtype == torch.bfloat16
        assert result.isfinite().all()


@every_compressor
def test_patches_must_form_a_square(name):
    compressor = build(name)
    given = {key: torch.cat([v, v[:, :1]], dim=1) if v.shape[1] == 36 else v for key, v in inputs(compressor).items()}
    with pytest.raises(ValueError, match="square grid of patches, got 37"):
        compressor(**given)


def test_names_are_unique():
    with pytest.raises(ValueError, match="'query' is taken"):
        register("query")(object)
