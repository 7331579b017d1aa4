"""Probes and gradient checkpointing, which runs layers again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import LlavaForConditionalGeneration

from probes import PatchActivations, TokenMap, intervene, logit_lens, record_attention, record_states
from probes.replay import replay

Model = LlavaForConditionalGeneration
Inputs = dict[str, torch.Tensor]
PATCH = PatchActivations("vision", [1], "mlp", "zero")
PROBES: list[Callable[[Model, TokenMap], AbstractContextManager[Any]]] = [
    lambda model, tokens: intervene(model, tokens, PATCH),
    lambda model, tokens: record_attention(model, tokens),
    lambda model, tokens: record_attention(model, tokens, backend="nnsight"),
    lambda model, tokens: record_states(model, tokens, "vision"),
    lambda model, tokens: logit_lens(model, tokens),
    lambda model, tokens: replay(model, [1]),
]


def gradients(model: Model, inputs: Inputs) -> dict[str, torch.Tensor]:
    with intervene(model, TokenMap.from_inputs(model, inputs), PATCH):
        loss = model(**inputs, use_cache=False).logits.square().mean()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def checkpointed(model: Model, reentrant: bool) -> Model:
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("probe", PROBES, ids=["intervene", "record", "nnsight", "states", "lens", "replay"])
def test_probe_with_gradient_checkpointing_in_training_raises(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], probe: Any, reentrant: bool
) -> None:
    model, inputs = checkpointed(make_llava(), reentrant), make_inputs()
    raises = pytest.raises(RuntimeError, match="gradient_checkpointing_disable")
    with raises, probe(model, TokenMap.from_inputs(model, inputs)):
        model(**inputs, use_cache=False)


def test_intervene_after_disabled_checkpointing_has_gradients_of_plain_training(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """The advice of the error works."""
    model = checkpointed(make_llava(), reentrant=True)
    model.gradient_checkpointing_disable()
    expected, actual = gradients(make_llava().train(), make_inputs()), gradients(model, make_inputs())
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient)


@pytest.mark.parametrize("training", [True, False])
def test_record_states_with_checkpointing_but_no_repeat_equals_plain_states(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], training: bool
) -> None:
    """Nothing runs again in eval mode, or without gradients."""
    plain, inputs = make_llava(), make_inputs()
    model = checkpointed(make_llava(), reentrant=True).train(training)
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), record_states(plain, tokens, "vision") as expected:
        plain(**inputs, use_cache=False)
    with torch.set_grad_enabled(not training), record_states(model, tokens, "vision") as actual:
        model(**inputs, use_cache=False)
    torch.testing.assert_close(actual[2], expected[2])


@pytest.mark.parametrize("reentrant", [True, False])
def test_intervene_caller_checkpoints_whole_model_raises_in_backward(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], reentrant: bool
) -> None:
    model, inputs = make_llava(), make_inputs()
    scale = torch.ones(1, requires_grad=True)
    with intervene(model, TokenMap.from_inputs(model, inputs), PATCH):
        loss = checkpoint(lambda s: (s * model(**inputs).logits).mean(), scale, use_reentrant=reentrant)
        with pytest.raises(RuntimeError, match="backward pass runs the model again"):
            loss.backward()
