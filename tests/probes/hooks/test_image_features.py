"""Image features are computed once for repeated calls, which get the same logits as calls of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from probes.hooks.image_features import reuse_image_features
from tests.probes.tokens.families.build import MODEL_FAMILIES, tiny
from tests.probes.tokens.families.test_all import make_inputs
from tests.tiny_models import tiny_llava


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name in MODEL_FAMILIES if name != "llava_mini"])
def test_reuse_image_features_of_every_family_equals_calls_of_their_own(family: str) -> None:
    """Pixels that change inside the block have no effect, so features are those of the first call."""
    model, inputs = tiny(family).model(), make_inputs(family, "left")
    expected = model(**inputs).logits
    pixels = next(name for name in inputs if name.startswith("pixel_values"))
    changed = inputs | {pixels: inputs[pixels].flip(-1)}
    with reuse_image_features(model):
        for given in (inputs, changed, changed):
            torch.testing.assert_close(model(**given).logits, expected, atol=1e-5, rtol=0)
    assert not torch.equal(model(**changed).logits, expected), "outside the block, each call has its own images"


@torch.no_grad()
def test_reuse_image_features_of_output_without_field_for_them_equals_call_of_its_own(
    make_inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLaVA of transformers 5.17 sets `pooler_output` on the output of any vision tower, also without such a field."""
    model, inputs = tiny_llava(), make_inputs("left")
    expected, encode = model(**inputs).logits, model.model.get_image_features

    def encode_without_field(*args: Any, **kwargs: Any) -> BaseModelOutput:
        features = encode(*args, **kwargs)
        output = BaseModelOutput(last_hidden_state=features.last_hidden_state)
        output.pooler_output = features.pooler_output
        return output

    monkeypatch.setattr(model.model, "get_image_features", encode_without_field)
    with reuse_image_features(model):
        assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(model(**inputs).logits, expected)


def fail_after_call(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    model(**inputs)
    raise ValueError("no such input")


@torch.no_grad()
def test_reuse_image_features_after_exception_restores_model(make_inputs: Any) -> None:
    model, inputs = tiny_llava(), make_inputs("left")
    with pytest.raises(ValueError, match="no such input"), reuse_image_features(model):
        fail_after_call(model, inputs)
    assert all("get_image_features" not in vars(module) for module in model.modules())
    assert not model._forward_pre_hooks


@torch.no_grad()
def test_reuse_image_features_in_nested_blocks_keeps_outer_features(make_inputs: Any) -> None:
    model, inputs = tiny_llava(), make_inputs("left")
    other = inputs | {"pixel_values": -inputs["pixel_values"]}
    expected = model(**inputs).logits
    with reuse_image_features(model):
        model(**inputs)
        with reuse_image_features(model):
            assert torch.equal(model(**other).logits, expected)
        assert torch.equal(model(**other).logits, expected)
    assert not torch.equal(model(**other).logits, expected)
