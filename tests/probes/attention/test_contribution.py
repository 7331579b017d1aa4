"""`AttentionRecord.contribution` against an explicit computation from weights, values and the output projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from probes import TokenMap, record_attention
from probes.attention import layout
from tests.probes.attention_reference import label_responses

Inputs = dict[str, torch.Tensor]


def expected_contribution(model: Any, inputs: Inputs, tokens: TokenMap, targets: tuple[str, ...]) -> np.ndarray:
    """Return the mean norms in float64, query by query, from an eager pass of a Llama inside a LLaVA."""
    layers = model.get_decoder().layers
    values: list[torch.Tensor] = []
    hooks = [layer.self_attn.v_proj.register_forward_hook(lambda *call: values.append(call[2])) for layer in layers]
    attentions = model(**inputs, output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    labels, length = tokens.labels, tokens.labels.shape[1]
    visible = torch.ones(length, length, dtype=torch.bool).tril() & (labels != tokens.index("pad"))[:, None]
    heads, width = attentions[0].shape[1], layers[0].self_attn.head_dim
    result = np.full((len(layers), len(labels), heads, len(targets), len(tokens.groups)), np.nan)
    for index in np.ndindex(result.shape):
        layer, sample, head, target, source = index
        projection = layers[layer].self_attn.o_proj.weight.double()[:, head * width : (head + 1) * width]
        key_head = head * values[layer].shape[-1] // width // heads
        value = values[layer][sample].double()[:, key_head * width : (key_head + 1) * width]
        norms = []
        for query in (labels[sample] == tokens.index(targets[target])).nonzero().flatten():
            keys = (labels[sample] == source) & visible[sample, query]
            if keys.any():
                added = attentions[layer][sample, head, query, keys].double() @ value[keys]
                norms.append(float((projection @ added).norm()))
        if norms:
            result[index] = np.mean(norms)
    return result


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("scores", [2**20, 200])
def test_contribution_equals_norm_of_weighted_values(
    make_llava: Callable[..., Any],
    make_inputs: Callable[..., Inputs],
    monkeypatch: pytest.MonkeyPatch,
    implementation: str,
    scores: int,
) -> None:
    monkeypatch.setattr(layout, "SCORES_PER_CHUNK", scores)
    model, inputs = make_llava(implementation), label_responses(make_inputs())
    tokens = TokenMap.from_inputs(model, inputs)
    plain = model(**inputs).logits
    with record_attention(model, tokens, statistics=["contribution"]) as attention:
        recorded = model(**inputs).logits
    assert torch.equal(plain, recorded)
    expected = expected_contribution(make_llava("eager"), inputs, tokens, attention.targets)
    np.testing.assert_allclose(attention.contribution.numpy(), expected, rtol=1e-4, atol=1e-5)
    with record_attention(model, tokens, heads=[1, 2], layers=[2], statistics=["contribution"]) as some:
        model(**inputs)
    np.testing.assert_allclose(some.contribution.numpy(), expected[2:, :, 1:3], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_contribution_of_one_source_equals_norm_of_module_output(make_llama: Callable[..., Any]) -> None:
    """With one head and one source, everything that the module writes comes from it."""
    model = make_llama(num_attention_heads=1, num_key_value_heads=1)
    ids = torch.tensor([[3, 63, 63, 4, 5, 6]])
    tokens = TokenMap(torch.zeros_like(ids), groups=("text",), generated="text")
    outputs: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *call: outputs.append(call[2][0]))
    with record_attention(model, tokens, statistics=["contribution"]) as attention:
        model(ids)
    for layer, output in enumerate(outputs):
        assert float(attention.contribution[layer].squeeze()) == pytest.approx(float(output[0].norm(dim=-1).mean()))


@torch.no_grad()
def test_contribution_with_zero_values_is_zero_while_mass_is_not(
    make_llava: Callable[..., Any], make_inputs: Callable[..., Inputs]
) -> None:
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    model.get_decoder().layers[1].self_attn.v_proj.weight.zero_()
    with record_attention(model, tokens, targets=["instruction"], statistics=["contribution"]) as attention:
        model(**inputs)
    vision = tokens.index("vision")
    assert (attention.contribution[1, :2, :, 0, vision] == 0).all()
    assert (attention.contribution[0, :2, :, 0, vision] > 0).all()
    assert (attention.mass[1, :2, :, 0, vision] > 0).all()


def test_contribution_in_generation_equals_one_pass(
    make_llava: Callable[..., Any], make_inputs: Callable[..., Inputs]
) -> None:
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    with record_attention(model, tokens, statistics=["contribution", "value_norm"]) as stepwise:
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, :-1]
    is_step = torch.arange(ids.shape[1]) >= inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
    full = {"input_ids": ids, "attention_mask": mask, "pixel_values": inputs["pixel_values"]}
    full_map = TokenMap.from_inputs(model, full | {"labels": ids.masked_fill(~is_step.expand_as(ids), -100)})
    with torch.no_grad(), record_attention(model, full_map, statistics=["contribution", "value_norm"]) as whole:
        model(**full)
    torch.testing.assert_close(stepwise.contribution, whole.contribution, equal_nan=True, rtol=1e-4, atol=1e-5)
    real = mask.bool()[None, :, None].expand_as(whole.value_norm)
    torch.testing.assert_close(stepwise.value_norm[real], whole.value_norm[real], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_contribution_with_lora_counts_adapter(
    make_llava: Callable[..., Any], make_inputs: Callable[..., Inputs]
) -> None:
    peft = pytest.importorskip("peft")
    inputs = make_inputs()
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*(o_proj|v_proj)", init_lora_weights=False)
    adapted = peft.get_peft_model(make_llava(), config).eval()
    tokens = TokenMap.from_inputs(adapted, inputs)
    with record_attention(adapted, tokens, statistics=["contribution"]) as attention:
        adapted(**inputs)
    merged = adapted.merge_and_unload()
    merged.set_attn_implementation("eager")
    expected = expected_contribution(merged, inputs, tokens, attention.targets)
    np.testing.assert_allclose(attention.contribution.numpy(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_contribution_in_bfloat16_is_close_to_float32(
    make_llava: Callable[..., Any], make_inputs: Callable[..., Inputs]
) -> None:
    model, inputs = make_llava().bfloat16(), make_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    tokens = TokenMap.from_inputs(model, inputs)
    with record_attention(model, tokens, statistics=["contribution"], layers=[0]) as attention:
        model(**inputs)
    wide = make_llava("eager")
    wide.load_state_dict({name: values.float() for name, values in model.state_dict().items()})
    inputs["pixel_values"] = inputs["pixel_values"].float()
    expected = expected_contribution(wide, inputs, tokens, attention.targets)[:1]
    np.testing.assert_allclose(attention.contribution.numpy(), expected, rtol=0.05, atol=0.05)


def test_contribution_with_changed_head_outputs_raises_value_error(
    make_llava: Callable[..., Any], make_inputs: Callable[..., Inputs]
) -> None:
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    projection: nn.Module = model.get_decoder().layers[1].self_attn.o_proj
    projection.register_forward_pre_hook(lambda module, args: (2 * args[0],), prepend=True)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"contribution: LlamaAttention.*o_proj"),
        record_attention(model, tokens, statistics=["contribution"]),
    ):
        model(**inputs)


def test_contribution_without_known_projection_raises_value_error(make_llama: Callable[..., Any]) -> None:
    model, ids = make_llama(), torch.tensor([[3, 63, 4]])
    model.model.layers[0].self_attn.output = model.model.layers[0].self_attn.__dict__["_modules"].pop("o_proj")
    tokens = TokenMap.from_inputs(model, {"input_ids": ids})
    with (
        pytest.raises(ValueError, match=r"contribution: LlamaAttention has no.*o_proj"),
        record_attention(model, tokens, statistics=["contribution"]),
    ):
        pass
