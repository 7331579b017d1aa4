"""Dropping visual tokens on every family, each with its own mask, cache and positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from probes import RemoveTokens, TokenMap, intervene
from probes.hooks.decoder import decoder_layers, find_decoder
from probes.pruning import fastv
from tests.probes.tokens.families.build import FAMILIES, LAYERS, tiny
from tests.probes.tokens.families.test_all import make_inputs

SLIDING = {"gemma3"}
THREE_AXES = {family for family in FAMILIES if family.startswith("qwen")}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_drop_is_eager_attention_without_these_keys(family: str, side: str) -> None:
    """From layer 1 to the last, under a mask from which the keys were taken by hand; rows of 0, 1 and 2 pictures."""
    inputs, model, eager = make_inputs(family, side), tiny(family).model(), tiny(family).model("eager")
    tokens = TokenMap.from_inputs(model, inputs)
    keys = tokens.mask("vision")[:, None, None, :]

    def cut(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        least = torch.finfo(torch.float32).min
        return args, kwargs | {"attention_mask": kwargs["attention_mask"].masked_fill(keys, least)}

    removal = RemoveTokens("vision", range(1, LAYERS), how="drop")
    with torch.no_grad():
        with intervene(model, tokens, removal) as receipt:
            dropped = model(**inputs, use_cache=False).logits
        for layer in decoder_layers(find_decoder(eager))[1:]:
            layer.register_forward_pre_hook(cut, with_kwargs=True)
        expected = eager(**inputs, use_cache=False).logits
    assert set(receipt[0].tokens.values()) == {int(tokens.mask("vision").sum())}
    text = ~tokens.mask("pad") & ~tokens.mask("vision")
    torch.testing.assert_close(dropped[text], expected[text], atol=1e-4, rtol=0)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_generation(family: str, positions: Any) -> None:
    """The logits of every step are those of hidden tokens; what cannot be right is refused."""
    inputs, model = make_inputs(family, "left"), tiny(family).model()
    tokens = TokenMap.from_inputs(model, inputs)

    def said(how: Any) -> torch.Tensor:
        with intervene(model, tokens, RemoveTokens("vision", range(1, LAYERS), how=how, positions=positions)):
            out = model.generate(
                **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        return torch.stack(out.logits)

    if family in THREE_AXES and positions == "renumber":
        with pytest.raises(ValueError, match="does not turn its tokens by one position id each"):
            said("drop")
    elif family in SLIDING:
        with pytest.raises(ValueError, match="has a DynamicSlidingWindowLayer"):
            said("drop")
    else:
        torch.testing.assert_close(said("drop"), said("mask"), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_fastv(family: str) -> None:
    """Half of each row's visual tokens, and the same ones when they are hidden."""
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
    live = ~tokens.mask("pad")
    torch.testing.assert_close(logits[0][live], logits[1][live], atol=1e-4, rtol=0)
