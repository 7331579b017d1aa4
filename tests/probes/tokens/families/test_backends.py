"""Attention recorded through nnsight and TransformerLens, on every model family."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from transformers import Blip2ForConditionalGeneration, PreTrainedModel

import llava_mini.transformer_lens  # noqa: F401
from probes import TokenMap, record_attention
from tests.probes.tokens.families.boxes import CoordinateImage
from tests.probes.tokens.families.build import MODEL_FAMILIES, tiny

# Families that transformer-lens 4.3 supports without torchvision.
TRANSFORMER_LENS_FAMILIES = (
    "llava",
    "llava_next",
    "llava_onevision",
    "llava_mini",
    "idefics3",
    "gemma3",
    "mistral3",
    "llama4",
    "gemma4",
)


@torch.no_grad()
def check_backend_agrees(model: PreTrainedModel, inputs: Any, backend: str) -> None:
    """Check that a back end records a prompt and three steps as our hooks do; of BLIP-2, the prompt alone."""
    tokens = TokenMap.from_inputs(model, inputs)

    def run() -> torch.Tensor:
        if isinstance(model, Blip2ForConditionalGeneration):  # its `generate` does not call the model
            return model(**inputs).logits[:, -1]
        return model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)

    with record_attention(model, tokens) as expected:
        answer = run()
    with record_attention(model, tokens, backend=backend) as actual:
        torch.testing.assert_close(run(), answer, rtol=0, atol=1e-4)
    assert torch.equal(actual.queries, expected.queries)
    for name in ("mass", "entropy", "received"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=0, atol=1e-5, equal_nan=True)


def inputs_of(family: str) -> dict[str, Any]:
    coordinate_images = [[CoordinateImage(40, 24)], [], [CoordinateImage(24, 32), CoordinateImage(33, 30)]]
    images = [[image.image for image in row] for row in coordinate_images]
    return dict(tiny(family)(["see # ?", "there is nothing to see", "the first # and then # of these"], images))


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_record_attention_with_nnsight_equals_hooks(family: str) -> None:
    check_backend_agrees(tiny(family).model(), inputs_of(family), "nnsight")


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_record_attention_with_transformer_lens_equals_hooks_or_raises(family: str) -> None:
    with_torchvision = family in ("qwen2_5_vl", "qwen3_vl") and importlib.util.find_spec("torchvision") is not None
    if family in TRANSFORMER_LENS_FAMILIES or with_torchvision:
        check_backend_agrees(tiny(family).model(), inputs_of(family), "transformer_lens")
    else:
        with pytest.raises((ValueError, ImportError), match=r"no adapter for|needs the optional (torchvision|timm)"):
            check_backend_agrees(tiny(family).model(), inputs_of(family), "transformer_lens")
