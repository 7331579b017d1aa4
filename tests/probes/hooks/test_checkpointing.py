"""Probes and gradient checkpointing, which runs layers again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

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
@pytest.mark.parametrize("probe", PROBES, ids=["intervene", "record", "nnsight", "states", "lens", "replay"])
def test_probe_in_checkpoint_of_the_whole_model_raises(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], probe: Any, reentrant: bool
) -> None:
    """The backward pass would run the model again, after the block without the intervention."""
    model, inputs = make_llava(), make_inputs()
    scale, name = torch.ones(1, requires_grad=True), "CheckpointFunction" if reentrant else "torch.utils.checkpoint"
    raises = pytest.raises(RuntimeError, match=rf"^{name} would run LlamaModel again")
    with raises, probe(model, TokenMap.from_inputs(model, inputs)):
        checkpoint(lambda s: (s * model(**inputs).logits).mean(), scale, use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_intervene_on_layers_in_checkpoint_wrappers_raises(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], reentrant: bool
) -> None:
    """FSDP's activation checkpointing wraps layers so, and sets no `gradient_checkpointing`."""
    model, inputs = make_llava(), make_inputs()
    model.enable_input_require_grads()
    implementation = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    apply_activation_checkpointing(
        model.model.language_model,
        checkpoint_wrapper_fn=partial(checkpoint_wrapper, checkpoint_impl=implementation),
        check_fn=lambda module: isinstance(module, LlamaDecoderLayer),
    )
    tokens = TokenMap.from_inputs(model, inputs)
    with (
        pytest.raises(RuntimeError, match=r"would run LlamaRMSNorm|LlamaAttention again"),
        intervene(model, tokens, PATCH),
    ):
        model(**inputs, use_cache=False)
    plain = make_llava()
    with torch.no_grad(), intervene(model, tokens, PATCH), intervene(plain, tokens, PATCH):
        torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("reentrant", [True, False])
def test_intervene_in_checkpoint_without_gradients_equals_plain_call(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], reentrant: bool
) -> None:
    """Nothing runs again without gradients."""
    model, inputs = make_llava(), make_inputs()
    scale = torch.ones(1, requires_grad=True)
    with torch.no_grad(), intervene(model, TokenMap.from_inputs(model, inputs), PATCH):
        expected = model(**inputs).logits
        actual = checkpoint(lambda s: s * model(**inputs).logits, scale, use_reentrant=reentrant)
    torch.testing.assert_close(actual, expected)


def test_intervene_backward_inside_block_through_earlier_checkpoint_raises(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """A call that was checkpointed before the block would run again with the probe."""
    model, inputs = make_llava(), make_inputs()
    scale = torch.ones(1, requires_grad=True)
    loss = checkpoint(lambda s: (s * model(**inputs).logits).mean(), scale, use_reentrant=False)
    raises = pytest.raises(RuntimeError, match="backward pass runs the model again")
    with raises, intervene(model, TokenMap.from_inputs(model, inputs), PATCH):
        loss.backward()
