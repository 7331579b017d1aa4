"""Contribution, mass alone and value norms of every model family, from its own eager attention."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from probes import TokenMap, record_attention
from probes.hooks.decoder import decoder_layers, find_decoder
from tests.probes.tokens.families.build import LAYERS, MODEL_FAMILIES, tiny
from tests.probes.tokens.families.test_all import make_inputs


def eager_calls(family: str, inputs: dict[str, Any]) -> list[tuple[Any, Tensor, Tensor, Tensor | None]]:
    """Return the attention module, values, weights and gate of each layer of an eager pass."""
    model = tiny(family).model("eager")
    modules = [layer.self_attn for layer in decoder_layers(find_decoder(model))]
    calls, gates = [], {}
    source = sys.modules[type(modules[0]).__module__]
    own = source.eager_attention_forward

    def capture(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = own(module, query, key, value, *args, **kwargs)
        if module in modules:
            calls.append((module, value, output[1], gates.get(module)))
        return output

    for module in modules if family == "qwen3_5" else ():

        def keep_gate(module: Any, args: Any, output: Tensor, attention: Any = module) -> None:
            by_head = output.unflatten(-1, (-1, 2, attention.head_dim))
            gates[attention] = by_head[..., 1, :].sigmoid().transpose(1, 2).double()

        module.q_proj.register_forward_hook(keep_gate)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(source, "eager_attention_forward", capture)
        model(**inputs)
    return calls


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_statistics_of_values_equal_eager_attention(family: str) -> None:
    inputs, model = make_inputs(family, "left"), tiny(family).model()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad():
        plain = model(**inputs).logits
        with record_attention(model, tokens, statistics=["contribution", "value_norm"]) as attention:
            recorded = model(**inputs).logits
        with record_attention(model, tokens) as default:
            model(**inputs)
        with record_attention(model, tokens, statistics=["mass"]) as mass_alone:
            model(**inputs)
    assert torch.equal(plain, recorded)
    torch.testing.assert_close(mass_alone.mass, default.mass, atol=1e-5, rtol=0, equal_nan=True)
    calls = eager_calls(family, inputs)
    assert len(calls) == LAYERS
    in_source = torch.stack([tokens.mask(group) for group in tokens.groups]).double()
    for layer, (module, value, weights, gate) in enumerate(calls):
        heads, width = weights.shape[1], value.shape[-1]
        value = value.double().repeat_interleave(heads // value.shape[1], dim=1)
        added = torch.einsum("bhqk,sbk,bhkw->bhqsw", weights.double(), in_source, value)
        if gate is not None:
            added = added * gate[:, :, :, None]
        projection = getattr(module, "out_proj" if family == "blip_2" else "o_proj").weight
        by_head = projection.double().unflatten(1, (heads, width))
        norms = torch.einsum("bhqsw,ohw->bhqso", added, by_head).norm(dim=-1)
        attends = torch.einsum("bqk,sbk->bqs", (weights > 0).any(1).double(), in_source) > 0
        for target, group in enumerate(attention.targets):
            counted = tokens.mask(group)[..., None] & attends
            mean = (norms * counted[:, None]).sum(2) / counted.sum(1)[:, None]
            actual = attention.contribution[layer, :, :, target]
            torch.testing.assert_close(actual, mean.float(), rtol=1e-3, atol=1e-4, equal_nan=True)
        real = ~tokens.mask("pad")[:, None].expand(-1, heads, -1)
        norm = attention.value_norm[layer]
        torch.testing.assert_close(norm[real], value.norm(dim=-1)[real].float(), rtol=1e-4, atol=1e-4)
