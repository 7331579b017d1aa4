"""Vision towers and decoders of other families than CLIP and Llama."""

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
    # tanh caps and windows of Gemma are only exact under eager attention
    return tiny_mini(text, vision, prefusion_init="language_model")


@torch.no_grad()
def test_prefusion_is_the_first_layers(model, sample):
    """Started from the language model and as deep, pre-fusion gives its last state ahead of the norm."""
    ids, pixels = sample(4, 7)
    embeds, _ = model.model.fuse(ids[None], pixels[None])
    patches, tokens = model.model.encode(pixels[None, None])
    raw = model.get_input_embeddings()(ids[ids != 99])[None]
    states = model.model.language_model(inputs_embeds=torch.cat([patches, tokens, raw], dim=1)).last_hidden_state
    normed = model.model.language_model.norm(embeds[0, ids != 99])
    torch.testing.assert_close(normed, states[0, 20:], atol=1e-4, rtol=1e-4)


def test_generation_with_and_without_a_cache(model, sample):
    ids, pixels = sample(4, 7)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "suppress_tokens": [99]}
    new = [model.generate(ids[None], pixel_values=pixels[None], **settings, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*new)


@torch.no_grad()
def test_round_trip(model, sample, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    ids, pixels = sample(4, 7)
    inputs = {"input_ids": ids[None], "pixel_values": pixels[None]}
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
