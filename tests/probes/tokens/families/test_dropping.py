"""Dropping visual tokens on every model family, with its own mask, cache and positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from probes import RemoveTokens, TokenMap, intervene
from probes.hooks.decoder import decoder_layers, find_decoder
from probes.pruning import fastv
from tests.probes.tokens.families.build import LAYERS, MODEL_FAMILIES, tiny
from tests.probes.tokens.families.test_all import make_inputs

# Their caches of some layers keep only the last tokens, or the tokens of the last chunk.
SLIDING_WINDOW_FAMILIES = {"gemma3", "llama4", "aya_vision"}
# Their layers receive tensors per token that cannot be shortened.
WHOLE_CALL_FAMILIES = {"blip_2", "gemma3n", "gemma4"}
MROPE_FAMILIES = {family for family in MODEL_FAMILIES if family.startswith("qwen")}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_remove_tokens_by_drop_equals_eager_attention_without_keys(family: str, side: str) -> None:
    """The mask of the eager model hides the keys from layer 1 on; rows have 0, 1 and 2 images."""
    inputs, model, eager = make_inputs(family, side), tiny(family).model(), tiny(family).model("eager")
    tokens = TokenMap.from_inputs(model, inputs)
    keys = tokens.mask("vision")[:, None, None, :]

    def hide_keys(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        least = torch.finfo(torch.float32).min
        return args, kwargs | {"attention_mask": kwargs["attention_mask"].masked_fill(keys, least)}

    removal = RemoveTokens("vision", range(1, LAYERS), how="drop")
    if family in WHOLE_CALL_FAMILIES:
        with pytest.raises(ValueError, match="cannot run its layers on some tokens only: use how='mask'"):
            intervene(model, tokens, removal).__enter__()
        return
    with torch.no_grad():
        with intervene(model, tokens, removal) as receipt:
            dropped = model(**inputs, use_cache=False).logits
        for layer in decoder_layers(find_decoder(eager))[1:]:
            layer.register_forward_pre_hook(hide_keys, with_kwargs=True)
        expected = eager(**inputs, use_cache=False).logits
    assert set(receipt[0].tokens.values()) == {int(tokens.mask("vision").sum())}
    text = ~tokens.mask("pad") & ~tokens.mask("vision")
    torch.testing.assert_close(dropped[text], expected[text], atol=1e-4, rtol=0)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_remove_tokens_by_drop_in_generation_equals_mask_or_raises(family: str, positions: Any) -> None:
    """The logits of every step equal those of masked tokens; unsupported families raise ValueError."""
    inputs, model = make_inputs(family, "left"), tiny(family).model()
    tokens = TokenMap.from_inputs(model, inputs)

    def step_logits(how: Any) -> torch.Tensor:
        with intervene(model, tokens, RemoveTokens("vision", range(1, LAYERS), how=how, positions=positions)):
            out = model.generate(
                **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        return torch.stack(out.logits)

    if family in MROPE_FAMILIES and positions == "renumber":
        with pytest.raises(ValueError, match=r"does not rotate its tokens by one position id each"):
            step_logits("drop")
    elif family in WHOLE_CALL_FAMILIES:
        with pytest.raises(ValueError, match=r"cannot run its layers on some tokens only|has no rotary_emb"):
            step_logits("drop")
    elif family in SLIDING_WINDOW_FAMILIES:
        with pytest.raises(ValueError, match="has a DynamicSlidingWindowLayer"):
            step_logits("drop")
    else:
        torch.testing.assert_close(step_logits("drop"), step_logits("mask"), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", [family for family in MODEL_FAMILIES if family not in WHOLE_CALL_FAMILIES])
def test_fastv_by_drop_equals_fastv_by_mask(family: str) -> None:
    """FastV removes half of each row's visual tokens, the same ones by dropping and by masking."""
    inputs, model = make_inputs(family, "left"), tiny(family).model()
    tokens = TokenMap.from_inputs(model, inputs)
    logits, chosen = [], []
    for how in ("mask", "drop"):
        with torch.no_grad(), fastv(model, tokens, 1, 0.5, how=how) as receipt:
            logits.append(model(**inputs, use_cache=False).logits)
        chosen.append(receipt[0].chosen)
    vision = tokens.mask("vision")
    assert torch.equal(chosen[0], chosen[1])
    assert torch.equal((vision & ~chosen[0]).sum(1), vision.sum(1) // 2)
    assert not (chosen[0] & ~vision).any()
    real = ~tokens.mask("pad")
    torch.testing.assert_close(logits[0][real], logits[1][real], atol=1e-4, rtol=0)
