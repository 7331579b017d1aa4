"""Relevancy against autograd over all layers at once, and on a model in which one patch alone matters."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from probes import RemoveTokens, TokenMap, intervene, record_attention
from probes.attribution import relevancy
from probes.readouts.logit_lens import logit_lens

from .conftest import IMAGE_TOKEN, LAYERS, text_config


def reference(model, inputs, at, answers):
    """Chefer's rule on full matrices of every layer, with the gradients of one backward pass through the model."""
    model.set_attn_implementation("eager")
    output = model(**inputs, output_attentions=True)
    rows = torch.arange(len(at))
    logits = output.logits[rows, at]
    answers = logits.argmax(-1) if answers is None else answers
    slopes = torch.autograd.grad(logits[rows, answers].sum(), output.attentions)
    moved = [
        (slope * weights).clamp(min=0).mean(1).detach()
        for slope, weights in zip(slopes, output.attentions, strict=True)
    ]
    rollout = torch.eye(moved[0].shape[-1]).expand_as(moved[0])
    for step in moved:
        rollout = rollout + step @ rollout
    return rollout[rows, at], torch.stack([step[rows, at] for step in moved]), logits[rows, answers].detach()


def _hooks(decoder):
    return [hook for module in decoder.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_the_rule_on_full_matrices(make_llava, make_inputs, side, implementation):
    model, inputs = make_llava(implementation), make_inputs(side)
    tokens = TokenMap.from_inputs(model, inputs)
    answers = torch.tensor([5, 17, 9])
    with torch.no_grad():  # the caller's mode does not matter
        found = relevancy(model, tokens, inputs, answers)
    assert model.config.text_config._attn_implementation == implementation
    assert model.model.vision_tower.config._attn_implementation == implementation
    at = torch.tensor([12, 12, 12]) if side == "left" else torch.tensor([12, 7, 6])
    assert found.at.tolist() == at.tolist(), "the last position that is no padding"
    rollout, layers, logits = reference(make_llava("eager"), inputs, at, answers)
    torch.testing.assert_close(found.rollout, rollout, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.layers, layers, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.logits, logits, rtol=1e-5, atol=1e-5)
    assert found.rollout[tokens.mask("pad")].count_nonzero() == 0
    assert not _hooks(model.model.language_model), "nothing is left behind"
    assert all(weight.grad is None for weight in model.parameters())


def test_own_answers_and_the_answer_of_supervised_rows(make_llava, make_inputs):
    model, inputs = make_llava(), make_inputs("left")
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -3:], labels[1, -1] = 4, 4
    tokens = TokenMap.from_inputs(model, inputs | {"labels": labels})
    found = relevancy(model, tokens, inputs)
    assert found.at.tolist() == [9, 11, 12], "before the first response, or the end"
    with torch.no_grad():
        own = model(**inputs).logits[[0, 1, 2], found.at].argmax(-1)
    assert torch.equal(found.answers, own)
    rollout, layers, _ = reference(make_llava("eager"), inputs, found.at, None)
    torch.testing.assert_close(found.rollout, rollout, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.layers, layers, rtol=1e-4, atol=1e-6)
    elsewhere = relevancy(model, tokens, inputs, at=torch.tensor([12, 12, 12]))
    assert elsewhere.at.tolist() == [12, 12, 12]


def test_hooks_that_transformers_leaves_do_not_matter(make_llava, make_inputs):
    model, inputs = make_llava("eager"), make_inputs("left")
    tokens = TokenMap.from_inputs(model, inputs)
    wanted = relevancy(model, tokens, inputs)
    with torch.no_grad():
        model(**inputs, output_attentions=True)
    assert _hooks(model.model.language_model)
    torch.testing.assert_close(relevancy(model, tokens, inputs).rollout, wanted.rollout)


def test_inference_mode_and_frozen_weights(make_llava, make_inputs):
    model, inputs = make_llava(), make_inputs("left")
    tokens = TokenMap.from_inputs(model, inputs)
    wanted = relevancy(model, tokens, inputs)
    model.requires_grad_(False)
    with torch.inference_mode():
        found = relevancy(model, tokens, inputs)
    torch.testing.assert_close(found.rollout, wanted.rollout)


@pytest.mark.parametrize("matters", [1, 2, 3])
def test_finds_the_one_patch_that_matters(make_rows, matters):
    """A layer by hand: every position is attended to evenly, and the values of one token alone hold the answer.

    Width 4: channel 0 marks the token, channel 1 is what attention writes, channel 2 the answer reads; 3 keeps the norm.
    """
    config = text_config(
        vocab_size=64,
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
    embedded[0, 2 + matters, 0] = 3
    found = relevancy(model, tokens, {"inputs_embeds": embedded}, torch.tensor([7]))
    patches = found.rollout[0, tokens.mask("vision")[0]]
    assert patches.argmax() == matters
    assert patches[matters] > 0
    assert patches.count_nonzero() == 1
    assert found.layers[0].count_nonzero() == 0
    assert found.layers[1, 0].argmax() == 2 + matters


def test_wrong_use_is_one_clear_line(make_llava, make_inputs):
    model, inputs = make_llava(), make_inputs("left")
    tokens = TokenMap.from_inputs(model, inputs)
    for arguments, message in (
        ({"answers": torch.tensor([1])}, r"answers have shape \[1\]: one token id for each of 3"),
        ({"at": torch.tensor([0, 0])}, "one position from 0 to 12 for each of 3"),
        ({"at": torch.tensor([0, 0, 13])}, "one position from 0 to 12 for each of 3"),
    ):
        with pytest.raises(ValueError, match=message):
            relevancy(model, tokens, inputs, **arguments)
    with pytest.raises(RuntimeError, match=r"3 x 4 heads x 13\^2 positions takes 0.0 GiB, over the limit"):
        relevancy(model, tokens, inputs, limit_gib=1e-6)
    with pytest.raises(ValueError, match="the token map has 2 x 13"):
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


def test_holds_one_layers_matrices_at_a_time(make_llama, make_rows, monkeypatch):
    """What autograd saves stays below the matrices of two layers, however deep the model."""
    inputs = make_rows([(3, 4, 93)], "left")
    alive, most = 0, 0

    class Held:
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
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        relevancy(model, tokens, {"input_ids": inputs["input_ids"]})
    assert 0 < most < 2 * 3, f"{most} matrices of {LAYERS} layers"
    assert alive == 0
