"""CLIP's activation function against transformers' module, and its place in a LLaVA-Mini."""

import pytest
import torch
from transformers.activations import QuickGELUActivation

from llava_mini import LlavaMiniConfig, LlavaMiniForConditionalGeneration
from llava_mini.quick_gelu import QuickGELU
from tests.tiny_models import tiny_llava_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", [False, True])
def test_quick_gelu_equals_transformers_to_the_last_bit(dtype, gradients):
    states = torch.linspace(-8, 8, 999).to(dtype)
    before = states.clone()
    with torch.set_grad_enabled(gradients):
        assert torch.equal(QuickGELU()(states), QuickGELUActivation()(states))
    assert torch.equal(states, before)


def test_quick_gelu_gradient_equals_transformers():
    gradients = []
    for module in (QuickGELU(), QuickGELUActivation()):
        states = torch.linspace(-8, 8, 99, requires_grad=True)
        module(states).sum().backward()
        gradients.append(states.grad)
    assert torch.equal(*gradients)


def test_llava_mini_has_no_activation_of_transformers_in_its_vision_tower():
    model = LlavaMiniForConditionalGeneration(tiny_llava_config(LlavaMiniConfig))
    kinds = {type(module) for module in model.model.vision_tower.modules()}
    assert QuickGELU in kinds
    assert QuickGELUActivation not in kinds
