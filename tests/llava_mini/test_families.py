"""LLaVA-Mini with vision towers and language models of other families than CLIP and Llama."""

from __future__ import annotations

import pytest
import torch

PAIRS = [
    ("qwen2", "dinov2"),
    ("qwen3", "siglip"),
    ("gemma", "clip"),
    ("gemma2", "dinov2"),
    ("gemma3", "siglip"),
]


@pytest.fixture(params=PAIRS, ids="-".join)
def model(request, tiny_mini):
    text, vision = request.param
    # Only eager attention applies Gemma's logit caps and sliding windows exactly.
    return tiny_mini(text, vision, prefusion_init="language_model")


@torch.no_grad()
def test_prefusion_copied_from_the_language_model_returns_its_last_state(model, sample):
    """Pre-fusion copies all layers, so its output is the language model's last state ahead of the norm."""
    ids, pixels = sample(4, 7)
    embeds, _ = model.model.fuse(ids[None], pixels[None])
    patches, tokens = model.model.encode(pixels[None, None])
    raw = model.get_input_embeddings()(ids[ids != 99])[None]
    states = model.model.language_model(inputs_embeds=torch.cat([patches, tokens, raw], dim=1)).last_hidden_state
    normed = model.model.language_model.norm(embeds[0, ids != 99])
    torch.testing.assert_close(normed, states[0, 20:], atol=1e-4, rtol=1e-4)


def test_generate_with_and_without_a_cache_is_the_same(model, sample):
    ids, pixels = sample(4, 7)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "suppress_tokens": [99]}
    outputs = [
        model.generate(ids[None], pixel_values=pixels[None], **settings, use_cache=cache) for cache in (True, False)
    ]
    assert torch.equal(*outputs)


@torch.no_grad()
def test_from_pretrained_of_a_saved_model_has_the_same_logits(model, sample, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    ids, pixels = sample(4, 7)
    inputs = {"input_ids": ids[None], "pixel_values": pixels[None]}
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
