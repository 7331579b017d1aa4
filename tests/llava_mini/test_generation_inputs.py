"""What `generate` takes besides token ids and pixels: a cache of earlier tokens, and embeddings."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from llava_mini.prefusion import CACHE_ARGUMENT

NEW = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "suppress_tokens": [99]}


@pytest.fixture
def make_cache(tiny_llava):
    return lambda: {CACHE_ARGUMENT: DynamicCache(config=tiny_llava().config.get_text_config())}


def test_generate_continues_a_cache_of_text(tiny_mini, make_cache):
    model, cache = tiny_mini(), make_cache()
    first = model.generate(input_ids=torch.tensor([[5, 6, 7]]), **cache, **NEW)
    second = torch.cat([first, torch.tensor([[8, 9]])], dim=1)
    assert torch.equal(model.generate(input_ids=second, **cache, **NEW), model.generate(input_ids=second, **NEW))


def test_generate_fills_an_empty_cache_with_the_fused_prompt(tiny_mini, sample, make_cache):
    model, (ids, pixels), cache = tiny_mini(), sample(4, 5), make_cache()
    output = model.generate(input_ids=ids[None], pixel_values=pixels[None], **cache, **NEW)
    assert torch.equal(output, model.generate(input_ids=ids[None], pixel_values=pixels[None], **NEW))
    assert cache[CACHE_ARGUMENT].get_seq_length() == output.shape[1] - 1


@pytest.mark.parametrize("with_pixels", [False, True])
def test_generate_from_a_cache_with_images_raises(tiny_mini, sample, make_cache, with_pixels):
    """New text would be in no pre-fusion, or without its images."""
    model, (ids, pixels), cache = tiny_mini(), sample(4, 5), make_cache()
    output = model.generate(input_ids=ids[None], pixel_values=pixels[None], **cache, **NEW)
    again = {"pixel_values": pixels[None]} if with_pixels else {}
    cached = output.shape[1] - 1
    with pytest.raises(ValueError, match=f"{CACHE_ARGUMENT} holds {cached} tokens"):
        model.generate(input_ids=torch.cat([output, ids[None, -2:]], dim=1), **cache, **again, **NEW)


def test_generate_without_prefusion_continues_a_cache_with_images(tiny_mini, sample, make_cache):
    model, (ids, pixels), cache = tiny_mini(prefusion_layers=0), sample(4, 5), make_cache()
    output = model.generate(input_ids=ids[None], pixel_values=pixels[None], **cache, **NEW)
    second = torch.cat([output, ids[None, -2:]], dim=1)
    expected = model.generate(input_ids=second, pixel_values=pixels[None], **NEW)
    assert torch.equal(model.generate(input_ids=second, **cache, **NEW), expected)


def test_generate_from_fused_embeddings_equals_that_from_pixels(tiny_mini, sample):
    model, (ids, pixels) = tiny_mini(), sample(4, 5)
    with torch.no_grad():
        embeddings, _ = model.model.fuse(ids[None], pixels[None])
    expected = model.generate(input_ids=ids[None], pixel_values=pixels[None], **NEW)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **NEW), expected[:, len(ids) :])
