"""Errors of `record_attention` for models, inputs and selections that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from probes import TokenMap, record_attention

Model = LlavaForConditionalGeneration
Inputs = dict[str, torch.Tensor]


class TestRecordAttentionErrors:
    def test_record_without_forward_pass_raises(
        self, make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
    ) -> None:
        model = make_llava()
        with record_attention(model, TokenMap.from_inputs(model, make_inputs())) as attention:
            pass
        with pytest.raises(RuntimeError, match="nothing was recorded"):
            _ = attention.mass

    @pytest.mark.parametrize("change", [slice(0, 2), (slice(None), slice(1, None))])
    def test_call_that_does_not_fit_token_map_raises(
        self, make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], change: Any
    ) -> None:
        inputs, model = make_inputs(), make_llava()
        sliced = {name: inputs[name][change] for name in ("input_ids", "attention_mask")}
        tokens = TokenMap.from_inputs(model, inputs | sliced)
        raises = pytest.raises(ValueError, match="the language model was called with 3 x 13")
        with raises, torch.no_grad(), record_attention(model, tokens):
            model(**inputs)

    def test_nested_record_on_one_model_raises(
        self, make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
    ) -> None:
        inputs, model = make_inputs(), make_llava()
        tokens = TokenMap.from_inputs(model, inputs)
        with record_attention(model, tokens) as outer:
            with pytest.raises(RuntimeError, match="being recorded already"), record_attention(model, tokens):
                pass
            with torch.no_grad():
                model(**inputs)
        assert outer.mass.isfinite().any(), "the outer record continues"

    def test_second_prompt_raises(self, make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]) -> None:
        inputs, model = make_inputs(), make_llava()
        with torch.no_grad(), record_attention(model, TokenMap.from_inputs(model, inputs)):
            model(**inputs)
            with pytest.raises(RuntimeError, match="second prompt"):
                model(**inputs)

    def test_unknown_layer_group_or_head_raises(
        self, make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
    ) -> None:
        model = make_llava()
        tokens = TokenMap.from_inputs(model, make_inputs())
        with pytest.raises(ValueError, match=r"layers \[3\] are outside the model.*3 layers"):
            record_attention(model, tokens, layers=[0, 3]).__enter__()
        with pytest.raises(ValueError, match="unknown group 'answer'"):
            record_attention(model, tokens, targets=["answer"]).__enter__()
        with pytest.raises(ValueError, match="targets are empty"):
            record_attention(model, tokens, targets=[]).__enter__()
        with pytest.raises(ValueError, match=r"heads \[4\] are unknown.*4 query heads, 0 to 3"):
            record_attention(model, tokens, heads=[4, 1]).__enter__()
        with pytest.raises(ValueError, match=r"heads are empty.*4 query heads"):
            record_attention(model, tokens, heads=[]).__enter__()
        with pytest.raises(ValueError, match=r"layers are empty.*3"):
            record_attention(model, tokens, layers=[]).__enter__()
        with pytest.raises(TypeError, match=r"heads: 'all' "):
            record_attention(model, tokens, heads="all").__enter__()
        with pytest.raises(TypeError, match=r"heads: '1' "):
            record_attention(model, tokens, heads=["1"]).__enter__()

    def test_model_without_recordable_attention_raises(
        self, make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
    ) -> None:
        model = make_llava()
        tokens = TokenMap.from_inputs(model, make_inputs())
        model.get_decoder().config._attn_implementation = "paged|eager"
        with pytest.raises(ValueError, match=r"'paged\|eager' cannot be probed.*'sdpa'"):
            record_attention(model, tokens).__enter__()
        with pytest.raises(ValueError, match=r"CLIPVisionModel.*no decoder layers"):
            record_attention(model.model.vision_tower, tokens).__enter__()

    def test_mask_that_cannot_be_read_raises(
        self, make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
    ) -> None:
        """A bool mask under eager attention hides nothing in the model itself."""
        inputs, model = make_inputs(), make_llava("eager")
        tokens = TokenMap.from_inputs(model, inputs)
        inputs["attention_mask"] = torch.ones(3, 1, 13, 13, dtype=torch.bool).tril()
        raises = pytest.raises(ValueError, match="eager attention adds its mask")
        with raises, torch.no_grad(), record_attention(model, tokens):
            model(**inputs)
        inputs["attention_mask"] = torch.zeros(3, 4, 13, 13)
        raises = pytest.raises(ValueError, match=r"mask of shape \[3, 4, 13, 13\]")
        with raises, torch.no_grad(), record_attention(model, tokens):
            model(**inputs)
