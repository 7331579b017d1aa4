"""Relevancy against autograd over all layers at once, and on a model in which one patch alone determines the answer."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from probes import RemoveTokens, TokenMap, intervene, record_attention
from probes.attribution import relevancy
from probes.readouts.logit_lens import logit_lens
from tests.tiny_models import IMAGE_TOKEN, LAYERS, sharp_text_config


def reference_relevancy(model, inputs, at, answers):
    """Apply the rule of Chefer et al. to full matrices, with gradients from one backward pass through the model."""
    model.set_attn_implementation("eager")
    output = model(**inputs, output_attentions=True)
    rows = torch.arange(len(at))
    logits = output.logits[rows, at]
    answers = logits.argmax(-1) if answers is None else answers
    gradients = torch.autograd.grad(logits[rows, answers].sum(), output.attentions)
    weighted = [
        (gradient * weights).clamp(min=0).mean(1).detach()
        for gradient, weights in zip(gradients, output.attentions, strict=True)
    ]
    rollout = torch.eye(weighted[0].shape[-1]).expand_as(weighted[0])
    for step in weighted:
        rollout = rollout + step @ rollout
    return rollout[rows, at], torch.stack([step[rows, at] for step in weighted]), logits[rows, answers].detach()


def _hooks(decoder):
    return [hook for module in decoder.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_relevancy_equals_rule_on_full_matrices(make_llava, make_inputs, side, implementation):
    model, inputs = make_llava(implementation), make_inputs(side)
    tokens = TokenMap.from_inputs(model, inputs)
    answers = torch.tensor([5, 17, 9])
    with torch.no_grad():  # relevancy turns gradients on itself
        result = relevancy(model, tokens, inputs, answers)
    assert model.config.text_config._attn_implementation == implementation
    assert model.model.vision_tower.config._attn_implementation == implementation
    at = torch.tensor([12, 12, 12]) if side == "left" else torch.tensor([12, 7, 6])
    assert result.at.tolist() == at.tolist(), "the last unpadded position"
    rollout, layers, logits = reference_relevancy(make_llava("eager"), inputs, at, answers)
    torch.testing.assert_close(result.rollout, rollout, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.layers, layers, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.logits, logits, rtol=1e-5, atol=1e-5)
    assert result.rollout[tokens.mask("pad")].count_nonzero() == 0
    assert not _hooks(model.model.language_model), "all hooks are removed"
    assert all(weight.grad is None for weight in model.parameters())


def test_relevancy_without_answers_explains_own_answers_before_response(make_llava, make_inputs):
    model, inputs = make_llava(), make_inputs("left")
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -3:], labels[1, -1] = 4, 4
    tokens = TokenMap.from_inputs(model, inputs | {"labels": labels})
    result = relevancy(model, tokens, inputs)
    assert result.at.tolist() == [9, 11, 12], "before the first response position, or the last position"
    with torch.no_grad():
        own_answers = model(**inputs).logits[[0, 1, 2], result.at].argmax(-1)
    assert torch.equal(result.answers, own_answers)
    rollout, layers, _ = reference_relevancy(make_llava("eager"), inputs, result.at, None)
    torch.testing.assert_close(result.rollout, rollout, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.layers, layers, rtol=1e-4, atol=1e-6)
    at_end = relevancy(model, tokens, inputs, at=torch.tensor([12, 12, 12]))
    assert at_end.at.tolist() == [12, 12, 12]


def test_relevancy_with_hooks_of_transformers_is_unchanged(make_llava, make_inputs):
    model, inputs = make_llava("eager"), make_inputs("left")
    tokens = TokenMap.from_inputs(model, inputs)
    expected = relevancy(model, tokens, inputs)
    with torch.no_grad():
        model(**inputs, output_attentions=True)
    assert _hooks(model.model.language_model)
    torch.testing.assert_close(relevancy(model, tokens, inputs).rollout, expected.rollout)


def test_relevancy_in_inference_mode_with_frozen_weights_is_unchanged(make_llava, make_inputs):
    model, inputs = make_llava(), make_inputs("left")
    tokens = TokenMap.from_inputs(model, inputs)
    expected = relevancy(model, tokens, inputs)
    model.requires_grad_(False)
    with torch.inference_mode():
        result = relevancy(model, tokens, inputs)
    torch.testing.assert_close(result.rollout, expected.rollout)


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_relevancy_of_hand_set_layer_finds_relevant_patch(make_rows, patch):
    """Every position receives equal attention, and the value of one patch alone holds the answer.

    Of the four channels, 0 marks the patch, 1 is written by attention and read by the head, and 3 keeps the norm.
    """
    config = sharp_text_config(
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        image_token_id=IMAGE_TOKEN,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        for module in model.modules():
            if "Norm" in type(module).__name__:
                module.weight.fill_(1)
        embeddings = model.model.embed_tokens.weight
        embeddings[:, 3] = 1
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = 1
        model.model.layers[1].self_attn.o_proj.weight[1, 0] = 1
        model.lm_head.weight[7, 1] = 1
    inputs = make_rows([(2, 4, 3)], "left")
    del inputs["pixel_values"]
    tokens = TokenMap.from_inputs(model, inputs)
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach()
    embedded[0, 2 + patch, 0] = 3
    result = relevancy(model, tokens, {"inputs_embeds": embedded}, torch.tensor([7]))
    patch_relevancy = result.rollout[0, tokens.mask("vision")[0]]
    assert patch_relevancy.argmax() == patch
    assert patch_relevancy[patch] > 0
    assert patch_relevancy.count_nonzero() == 1
    assert result.layers[0].count_nonzero() == 0
    assert result.layers[1, 0].argmax() == 2 + patch


def test_relevancy_of_lists_equals_relevancy_of_tensors(make_llava, make_inputs):
    model, inputs = make_llava(), make_inputs("left")
    tokens = TokenMap.from_inputs(model, inputs)
    given = relevancy(model, tokens, inputs, answers=[1, 2, 3], at=[12, 11, 12])
    expected = relevancy(model, tokens, inputs, answers=torch.tensor([1, 2, 3]), at=torch.tensor([12, 11, 12]))
    assert torch.equal(given.rollout, expected.rollout)
    assert given.at.tolist() == [12, 11, 12]


def test_relevancy_with_arguments_that_shape_the_output_is_unchanged(make_llava, make_inputs):
    model, inputs = make_llava(), make_inputs("left")
    tokens = TokenMap.from_inputs(model, inputs)
    given = relevancy(model, tokens, {**inputs, "logits_to_keep": 1, "return_dict": False}, at=[12, 11, 12])
    expected = relevancy(model, tokens, inputs, at=[12, 11, 12])
    assert torch.equal(given.rollout, expected.rollout)


def test_relevancy_with_invalid_arguments_raises(make_llava, make_inputs):
    model, inputs = make_llava(), make_inputs("left")
    tokens = TokenMap.from_inputs(model, inputs)
    for arguments, message in (
        ({"answers": torch.tensor([1])}, r"answers have shape \[1\].*3"),
        ({"answers": torch.tensor([1, 2, 9999])}, r"answers are \[1, 2, 9999\]"),
        ({"at": torch.tensor([0, 0])}, r"at is \[0, 0\].*0 to 12.*3 samples"),
        ({"at": [0, 0]}, r"at is \[0, 0\].*0 to 12.*3 samples"),
        ({"at": torch.tensor([0, 0, 13])}, r"at is \[0, 0, 13\].*0 to 12"),
    ):
        with pytest.raises(ValueError, match=message):
            relevancy(model, tokens, inputs, **arguments)
    with pytest.raises(RuntimeError, match=r"3 x 4 heads x 13\^2 positions.*limit"):
        relevancy(model, tokens, inputs, limit_gib=1e-6)
    with pytest.raises(ValueError, match=r"token map.*2 x 13"):
        relevancy(model, TokenMap(tokens.labels[:2]), inputs, at=torch.tensor([12, 12]))
    assert model.config.text_config._attn_implementation == "sdpa", "restored after an exception"
    for block in (
        record_attention(model, tokens),
        logit_lens(model, tokens),
        intervene(model, tokens, RemoveTokens("vision", [1])),
    ):
        with block:
            with pytest.raises(RuntimeError, match="another probe is open"):
                relevancy(model, tokens, inputs)
            model(**inputs)
    with pytest.raises(ValueError, match="training mode"):
        relevancy(model.train(), tokens, inputs)


def test_relevancy_stores_matrices_of_one_layer_at_a_time(make_llama, make_rows, monkeypatch):
    """Autograd saves less than the matrices of two layers, whatever the model's depth."""
    inputs = make_rows([(3, 4, 93)], "left")
    alive, most = 0, 0

    class SavedTensor:
        def __init__(self, tensor):
            nonlocal alive, most
            self.tensor = tensor
            if tensor.ndim == 4 and tensor.shape[-1] == tensor.shape[-2] == 100:
                alive += 1
                most = max(most, alive)
                self.counted = True

        def __del__(self):
            nonlocal alive
            alive -= hasattr(self, "counted")

    model = make_llama()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.autograd.graph.saved_tensors_hooks(SavedTensor, lambda saved: saved.tensor):
        relevancy(model, tokens, {"input_ids": inputs["input_ids"]})
    assert 0 < most < 2 * 3, f"{most} matrices of {LAYERS} layers"
    assert alive == 0
