"""Errors of `RemoveTokens`, mostly with `how="drop"`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import LlavaForConditionalGeneration, MistralConfig, MistralForCausalLM, StaticCache

from probes.attention.recording import record_attention
from probes.interventions import RemoveTokens, intervene
from probes.tokens.token_map import TokenMap
from tests.probes import reference_llama
from tests.tiny_models import tiny_text_config

Model = LlavaForConditionalGeneration
Inputs = dict[str, Tensor]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5, equal_nan=True)


class TestRemoveTokensErrors:
    @pytest.fixture
    def model(self, make_llava: Callable[..., Model]) -> Model:
        return make_llava()

    @pytest.fixture
    def inputs(self, make_inputs: Callable[..., Inputs]) -> Inputs:
        return make_inputs()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"how": "cut"}, "unknown how='cut'.*'mask' or 'drop'"),
            ({"positions": "shift"}, "unknown positions='shift'.*'keep' or 'renumber'"),
            ({"when": "later"}, "unknown when='later'.*'prefill', 'decode' or 'both'"),
            ({"keep_cache": True}, "keep_cache=True needs how='drop'"),
            ({"how": "drop", "when": "decode"}, "how='drop' does not work with when='decode'"),
            (
                {"positions": "renumber", "when": "prefill"},
                "positions='renumber' needs tokens that are removed in every call",
            ),
            (
                {"how": "drop", "keep_cache": True, "positions": "renumber"},
                "positions='renumber' needs tokens that are removed in every call",
            ),
        ],
    )
    def test_invalid_option_raises(self, model: Model, inputs: Inputs, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            intervene(model, TokenMap.from_inputs(model, inputs), RemoveTokens("vision", [1], **options)).__enter__()

    def test_static_cache_raises(self, model: Model, inputs: Inputs) -> None:
        past = StaticCache(config=model.config.text_config, max_cache_len=20)
        raises = pytest.raises(ValueError, match=r"layer 1 has a StaticLayer.*how='drop' needs a dynamic cache")
        tokens = TokenMap.from_inputs(model, inputs)
        with raises, torch.no_grad(), intervene(model, tokens, RemoveTokens("vision", [1], how="drop")):
            model(**inputs, past_key_values=past)
        self.assert_no_hooks(model)

    def test_sliding_cache_raises(self) -> None:
        """Without a cache, a sliding layer can drop tokens."""
        torch.manual_seed(0)
        config = tiny_text_config(
            MistralConfig,
            num_hidden_layers=2,
            sliding_window=3,
            initializer_range=0.2,
            image_token_id=reference_llama.IMAGE_TOKEN,
        )
        model: Any = MistralForCausalLM(config).eval()
        ids = torch.tensor([[5, 6, *[reference_llama.IMAGE_TOKEN] * 3, 7, 8, 9, 4]])
        tokens = TokenMap.from_inputs(model, {"input_ids": ids})
        logits = []
        for how in ("mask", "drop"):
            removal = RemoveTokens("vision", [0, 1], how=how)
            with torch.no_grad(), intervene(model, tokens, removal):
                logits.append(model(ids, use_cache=False).logits)
        close(*logits)
        raises = pytest.raises(ValueError, match=r"layer 0 has a DynamicSlidingWindowLayer.*use how='mask'")
        with raises, torch.no_grad(), intervene(model, tokens, removal):
            model(ids, use_cache=True)

    def test_prompt_cached_before_block_raises(self, model: Model, inputs: Inputs) -> None:
        tokens = TokenMap.from_inputs(model, inputs)
        raises = pytest.raises(ValueError, match="layer 1 cannot drop tokens that were cached before the block")
        with torch.no_grad():
            past = model(**inputs, use_cache=True).past_key_values
            mask = pad(inputs["attention_mask"], (0, 1), value=1)
            with raises, intervene(model, tokens, RemoveTokens("vision", [1], how="drop")):
                model(input_ids=torch.full((3, 1), 7), attention_mask=mask, past_key_values=past)

    def test_two_drops_in_one_layer_raise(self, model: Model, inputs: Inputs) -> None:
        tokens = TokenMap.from_inputs(model, inputs)
        pair = RemoveTokens("vision", [1, 2], how="drop"), RemoveTokens("system", [2], how="drop")
        with pytest.raises(ValueError, match="layer 2 drops tokens already"):
            intervene(model, tokens, *pair).__enter__()
        self.assert_no_hooks(model)

    def test_exception_inside_layer_leaves_no_hook(self, model: Model, inputs: Inputs) -> None:
        tokens = TokenMap.from_inputs(model, inputs)

        def fail(*args: Any) -> None:
            raise KeyError("from inside")

        handle = model.get_decoder().layers[1].mlp.register_forward_pre_hook(fail)
        with torch.no_grad():
            plain = record_attention(model, tokens)
            failing = intervene(model, tokens, RemoveTokens("vision", [1], how="drop"))
            with pytest.raises(KeyError, match="from inside"), failing:
                model(**inputs)
            handle.remove()
            self.assert_no_hooks(model)
            with plain as attention:
                model(**inputs)
        assert (attention.mass[1][:2, :, :, tokens.index("vision")] > 0).any()

    def test_renumber_three_position_axes_raises(self, model: Model, inputs: Inputs) -> None:
        """Qwen2-VL has such positions, which cannot be renumbered."""
        tokens = TokenMap.from_inputs(model, inputs)
        layer = model.get_decoder().layers[1]

        def expand_positions(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, kwargs | {"position_ids": kwargs["position_ids"].expand(3, -1, -1)}

        layer.register_forward_pre_hook(expand_positions, with_kwargs=True)
        raises = pytest.raises(ValueError, match="LlamaModel does not rotate its tokens by one position id each")
        removal = RemoveTokens("vision", [1], how="drop", positions="renumber")
        with raises, torch.no_grad(), intervene(model, tokens, removal):
            model(**inputs)

    @staticmethod
    def assert_no_hooks(model: Model) -> None:
        for module in model.get_decoder().modules():
            assert not module._forward_pre_hooks
            assert not module._forward_hooks
            assert not [name for name in module.__dict__ if "probes" in name]
