"""`keep_patches`: patches and compressed tokens in the language model, for pre-fusion within its own layers."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from llava_mini import LlavaMiniForConditionalGeneration, LlavaMiniProcessor

FIELDS = {"compressor_size": 2, "prefusion_layers": 0, "keep_patches": True}


@torch.no_grad()
@pytest.mark.parametrize("first", [True, False], ids=["compress first", "project first"])
def test_fuse_with_keep_patches_returns_patches_and_compressed_tokens(tiny_mini, sample, first):
    model = tiny_mini(compress_before_projection=first, **FIELDS)
    ids, pixels = sample(16 + 4, text=5)
    embeds, visual = model.model.fuse(ids[None], pixels[None])
    features = model.model.vision_tower(pixels[None], output_hidden_states=True).hidden_states[-2][:, 1:]
    project, compress = model.model.multi_modal_projector, model.model.compressor
    if first:
        parts = [project(features), project(compress(features)[0])]
    else:
        parts = [project(features), compress(project(features))[0]]
    expected = torch.cat(parts, dim=1)[0]
    torch.testing.assert_close(visual, expected)
    torch.testing.assert_close(embeds[0, 2:22], expected)
    assert torch.equal(embeds[0, 22:], model.get_input_embeddings()(ids)[22:])


@pytest.mark.parametrize("tiles", [1, 2])
@torch.no_grad()
def test_processor_with_keep_patches_matches_the_model_after_saving(tiny_mini, llava_processor, tmp_path, tiles):
    model = tiny_mini(compressor_heads=4, **FIELDS)
    processor = LlavaMiniProcessor.from_llava(llava_processor, model.config, tiles=tiles)
    inputs = processor(images=Image.new("RGB", (24, 24), (200, 30, 90)), text="what <image> is", return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 16 * tiles**2 + 4
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager").eval()
    loaded_processor = LlavaMiniProcessor.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs).logits, logits)
    assert loaded_processor.keep_patches
    assert loaded_processor.num_visual_tokens == 4
