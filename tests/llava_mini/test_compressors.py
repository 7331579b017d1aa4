"""Test the contract of every registered compressor."""

from __future__ import annotations

import pytest
import torch

from llava_mini.compressors import COMPRESSORS, register
from tests.llava_mini.compress import build, perturb_parameters, random_inputs

every_compressor = pytest.mark.parametrize("name", sorted(COMPRESSORS))

# Sizes up to that of the 6 x 6 grid that a method cannot make.
REFUSED_SIZES = {"pixel_shuffle": (4,)}


@every_compressor
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("training", [False, True])
def test_compressor_of_size_c_returns_c_squared_tokens(name, size, training):
    if size in REFUSED_SIZES.get(name, ()):
        with pytest.raises(ValueError, match=f"compressor_size={size} .*; it may be") as error:
            build(name, size)
        assert "\n" not in str(error.value)
        return
    compressor = build(name, size).train(training)
    tokens, weights = compressor(**random_inputs(compressor))
    assert tokens.shape == (3, size**2, 32)
    assert weights.shape == (3, size**2, 36)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, size**2))
    assert (weights >= 0).all()
    assert tokens.isfinite().all()


@every_compressor
@pytest.mark.parametrize("size", [1, 3])
def test_compressor_permuted_batch_permutes_tokens(name, size):
    compressor, order = build(name, size), torch.tensor([2, 0, 1])
    arguments = random_inputs(compressor)
    shuffled = {key: value[order] for key, value in arguments.items()}
    for permuted, result in zip(compressor(**shuffled), compressor(**arguments), strict=True):
        torch.testing.assert_close(permuted, result[order])


@every_compressor
def test_compressor_changed_image_leaves_other_images_unchanged(name):
    """A norm over the batch would pass the permutation test, but not this one."""
    compressor = build(name, 3)
    arguments = random_inputs(compressor)
    other = {
        key: torch.cat([value[1:2] if key == "text_mask" else value[1:2] * 3, value[1:]])
        for key, value in arguments.items()
    }
    for changed, result in zip(compressor(**other), compressor(**arguments), strict=True):
        torch.testing.assert_close(changed[1:], result[1:])


@every_compressor
def test_compressor_same_input_gives_same_tokens_under_any_seed(name):
    compressor = build(name, 3)
    torch.manual_seed(1)
    first = compressor(**random_inputs(compressor))
    torch.manual_seed(2)
    for one, other in zip(first, compressor(**random_inputs(compressor)), strict=True):
        assert torch.equal(one, other)


@every_compressor
def test_compressor_backward_reaches_all_parameters_and_all_weighted_patches(name):
    """The parameters are perturbed, because an output map that starts at zero passes no gradient on."""
    compressor = perturb_parameters(build(name))
    arguments = random_inputs(compressor)
    arguments["features"].requires_grad_()
    tokens, weights = compressor(**arguments)
    (tokens * torch.randn(tokens.shape)).sum().backward()
    assert torch.equal((arguments["features"].grad != 0).any(-1), (weights > 0).any(1))
    unreached = [key for key, p in compressor.named_parameters() if p.grad is None or not p.grad.any()]
    assert unreached == []


@every_compressor
def test_compressor_in_bfloat16_returns_finite_bfloat16(name):
    compressor = build(name).to(torch.bfloat16)
    arguments = {
        key: v.to(torch.bfloat16) if v.is_floating_point() else v for key, v in random_inputs(compressor).items()
    }
    for result in compressor(**arguments):
        assert result.dtype == torch.bfloat16
        assert result.isfinite().all()


@pytest.mark.parametrize("name", [name for name in sorted(COMPRESSORS) if not any(build(name).state_dict())])
def test_compressor_without_parameters_chooses_the_same_patches_under_autocast(name):
    """Nearly equal features: in bfloat16 their order changes, and training would choose others than evaluation."""
    compressor = build(name, 3)
    arguments = random_inputs(compressor)
    common = {"features", "keys", "projected"} & arguments.keys()
    arguments |= {key: 1 + 0.02 * arguments[key] for key in common}
    weights = compressor(**arguments)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compressor(**arguments)[1], weights)


@every_compressor
def test_compressor_nonsquare_patch_count_raises(name):
    compressor = build(name)
    arguments = {
        key: torch.cat([v, v[:, :1]], dim=1) if v.shape[1] == 36 else v for key, v in random_inputs(compressor).items()
    }
    with pytest.raises(ValueError, match="square grid of patches, got 37"):
        compressor(**arguments)


def test_register_taken_name_raises():
    with pytest.raises(ValueError, match="'query' is taken"):
        register("query")(object)
