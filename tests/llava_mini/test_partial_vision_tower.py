"""A vision tower run up to the deepest selected layer gives transformers' hidden states and leaves out the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava_mini.partial_vision_tower import hidden_states_at
from tests.tiny_models import tiny_vision_config

TOWERS = {
    "clip": (CLIPVisionModel, CLIPVisionConfig),
    "siglip": (SiglipVisionModel, SiglipVisionConfig),
    "dinov2": (Dinov2Model, Dinov2Config),
}
# Modules of each vision tower that its hidden states do not depend on, besides late layers.
TAILS = {"clip": ["post_layernorm"], "siglip": ["post_layernorm", "head"], "dinov2": ["layernorm"]}


class NeverRun(nn.Module):
    """Fail when called."""

    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("a module that nothing depends on was run")


@pytest.fixture(params=TOWERS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tower(family: str) -> Any:
    model_class, config_class = TOWERS[family]
    torch.manual_seed(0)
    return model_class(tiny_vision_config(config_class, num_hidden_layers=3)).eval()


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def layers_of(tower: Any) -> Any:
    return next(module for module in tower.modules() if isinstance(module, nn.ModuleList))


@pytest.mark.parametrize("indices", [[-2], [0], [-1], [3, -3, 1, 1]])
def test_hidden_states_at_any_index_equals_transformers(tower: Any, pixels: torch.Tensor, indices: list[int]) -> None:
    expected = tower(pixels, output_hidden_states=True).hidden_states
    states = hidden_states_at(tower, indices, pixels)
    assert len(states) == len(indices)
    for index, state in zip(indices, states, strict=True):
        assert torch.equal(state, expected[index])


@pytest.mark.parametrize("index", [1, -2])
def test_hidden_states_at_early_index_runs_nothing_behind_it(
    family: str, tower: Any, pixels: torch.Tensor, index: int
) -> None:
    expected = tower(pixels, output_hidden_states=True).hidden_states[index]
    layers = layers_of(tower)
    kept = list(layers)
    for late in range(index % 4, 3):
        layers[late] = NeverRun()
    owner = tower if hasattr(tower, TAILS[family][0]) else tower.vision_model
    for name in TAILS[family]:
        setattr(owner, name, NeverRun())
    assert torch.equal(hidden_states_at(tower, [index], pixels)[0], expected)
    assert list(layers)[: index % 4] == kept[: index % 4]  # the vision tower itself keeps its modules
    with pytest.raises(AssertionError):
        tower(pixels)


def test_hidden_states_at_with_gradients_equals_whole_run(tower: Any, pixels: torch.Tensor) -> None:
    gradients = []
    for run in (
        lambda: hidden_states_at(tower, [-2], pixels)[0],
        lambda: tower(pixels, output_hidden_states=True).hidden_states[-2],
    ):
        tower.zero_grad()
        run().square().sum().backward()
        gradients.append({name: p.grad for name, p in tower.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@pytest.mark.parametrize("place", ["late layer", "module in a late layer", "vision tower", "late layer, ahead"])
def test_hidden_states_at_with_a_hook_runs_what_the_hook_observes(tower: Any, pixels: torch.Tensor, place: str) -> None:
    late = layers_of(tower)[-1]
    module = {"vision tower": tower, "module in a late layer": late.mlp}.get(place, late)
    calls: list[Any] = []
    register = module.register_forward_pre_hook if place.endswith("ahead") else module.register_forward_hook
    handle = register(lambda *call: calls.append(call[-1]))
    state = hidden_states_at(tower, [1], pixels)[0]
    handle.remove()
    observed = len(calls)
    assert observed == 1
    assert torch.equal(state, hidden_states_at(tower, [1], pixels)[0])
    assert len(calls) == observed


def test_hidden_states_at_with_a_wrapped_forward_runs_the_wrapper(tower: Any, pixels: torch.Tensor) -> None:
    """Wrappers for several devices replace `forward` on modules."""
    original, calls = tower.forward, []
    tower.forward = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]
    hidden_states_at(tower, [1], pixels)
    assert calls == [1]


def test_hidden_states_at_with_recorded_attentions_equals_transformers(tower: Any, pixels: torch.Tensor) -> None:
    """`output_attentions` in the configuration makes transformers install hooks on a tower's layers."""
    expected = tower(pixels, output_hidden_states=True).hidden_states[1]
    tower.set_attn_implementation("eager")
    tower.config.output_attentions = True
    torch.testing.assert_close(hidden_states_at(tower, [1], pixels)[0], expected)
    assert len(tower(pixels).attentions) == 3
