"""Errors of `record_attention` through nnsight and TransformerLens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from nnsight import NNsight
from transformers import LlavaForConditionalGeneration

from probes import TokenMap
from probes.attention.backends.transformer_lens import wrap
from probes.attention.recording import record_attention
from tests.probes.attention.test_backends import assert_same_record

Model = LlavaForConditionalGeneration
Inputs = dict[str, torch.Tensor]
BACKENDS = ["nnsight", "transformer_lens"]


@pytest.mark.parametrize(
    ("make", "backend", "message"),
    [
        (lambda model: model, "nosuch", "unknown backend 'nosuch'.*native, nnsight or transformer_lens"),
        (lambda model: NNsight(model), "native", "NNsight cannot be recorded"),
        (
            lambda model: NNsight(model),
            "transformer_lens",
            "NNsight cannot be recorded with backend='transformer_lens'",
        ),
        (lambda model: wrap(model), "nnsight", "TransformerBridge cannot be recorded with backend='nnsight'"),
        (lambda model: wrap(model), "native", "TransformerBridge cannot be recorded"),
        (lambda model: wrap(model).original_model, "transformer_lens", "TransformerLens has rebuilt this model"),
        (lambda model: NNsight(torch.nn.Linear(2, 2)), "nnsight", "NNsight cannot be recorded with backend='nnsight'"),
    ],
)
def test_record_attention_unsupported_model_and_backend_raises(
    make_llava: Callable[..., Model],
    make_inputs: Callable[..., Inputs],
    make: Callable[[Model], Any],
    backend: str,
    message: str,
) -> None:
    model = make_llava()
    tokens = TokenMap.from_inputs(model, make_inputs())
    with pytest.raises(ValueError, match=message), record_attention(make(model), tokens, backend=backend):
        pass


def test_transformer_lens_record_class_without_adapter_raises(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    class WithoutAdapter(LlavaForConditionalGeneration):
        pass

    model = WithoutAdapter(make_llava().config)
    tokens = TokenMap.from_inputs(model, make_inputs())
    raises = pytest.raises(ValueError, match="no adapter for WithoutAdapter")
    with raises, record_attention(model, tokens, backend="transformer_lens"):
        pass


@torch.no_grad()
def test_nnsight_record_attention_without_plain_softmax_raises(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    with_sinks = make_llava()
    with_sinks.get_decoder().layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    inputs = make_inputs()
    for model in (wrap(make_llava()).original_model, with_sinks):
        raises = pytest.raises(ValueError, match="no softmax over the keys alone")
        with raises, record_attention(model, TokenMap.from_inputs(model, inputs), backend="nnsight"):
            model(**inputs)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_record_with_dropout_equals_native_record_or_raises(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], backend: str
) -> None:
    """The native record and nnsight read weights before dropout; TransformerLens reads them after it."""
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    with record_attention(model, tokens, layers=[0]) as native:
        model(**inputs)
    model.train()
    for layer in model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.5
    expected = pytest.raises(RuntimeError, match="with dropout") if backend == "transformer_lens" else nullcontext()
    with expected, record_attention(model, tokens, layers=[0], backend=backend) as theirs:
        model(**inputs)
    if backend == "nnsight":
        assert_same_record(theirs, native)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_record_without_prompt_or_with_second_prompt_raises(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], backend: str
) -> None:
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    with record_attention(model, tokens, backend=backend) as attention:
        with pytest.raises(RuntimeError, match="nothing was recorded"):
            _ = attention.mass
        model(**inputs)
        with pytest.raises(RuntimeError, match="second prompt"):
            model(**inputs)
