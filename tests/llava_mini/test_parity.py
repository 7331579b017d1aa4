"""The official forward pass (ictnlp/LLaVA-Mini at 47da113, float32, eager), reproduced from the same weights."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(official_model, request):
    official_model.set_attn_implementation(request.param)
    return official_model


@pytest.fixture(scope="module")
def inputs(official):
    """The official inputs with our placeholder for their -200; with C = 1 one stands for one."""
    input_ids = official["input_ids"].masked_fill(official["input_ids"] == -200, 127)
    # Id 0 as text would be masked by the official code and not by ours; 127 as text would be a second image to ours.
    assert not torch.isin(official["input_ids"], torch.tensor([0, 127])).any()
    return {"input_ids": input_ids, "pixel_values": official["pixels_image"].squeeze(1)}


@torch.no_grad()
def run(model, inputs, labels=None):
    """The model's output, and what the compressor and the pre-fusion layers returned."""
    seen = {}
    handles = [
        module.register_forward_hook(lambda *call, name=name: seen.update({name: call[-1]}))
        for name, module in (("compressor", model.model.compressor), ("prefusion", model.model.prefusion))
    ]
    try:
        return model(**inputs, labels=labels), seen
    finally:
        for handle in handles:
            handle.remove()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_vision_features(model, inputs, official):
    with torch.no_grad():
        close(model.model.look_at(inputs["pixel_values"]).features[..., :64], official["clip_features"])


def test_compressor(model, inputs, official):
    tokens, weights = run(model, inputs)[1]["compressor"]
    close(tokens, official["compressor_out"])
    close(weights, official["compressor_attention"])


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_prefusion_and_logits(model, inputs, official, mode):
    output, seen = run(model, inputs, official["labels"] if mode == "train" else None)
    visual, text = seen["prefusion"]
    is_text = official["input_ids"] != -200
    close(visual[:, -1:], official["image.prefused_vision"])
    close(output.image_hidden_states, official["image.prefused_vision"].flatten(0, 1))
    kept = is_text & (official["labels"] == -100 if mode == "train" else is_text)
    for row in range(2):
        close(text[row, : kept[row].sum()], official[f"image.fused_text_{mode}"][row, kept[row]])
    close(output.logits, official[f"image.logits_{mode}"])
    if mode == "train":
        close(output.loss, official["image.loss_train"])


def test_high_resolution(model, inputs, official):
    """Four tiles and the whole picture; one visual token."""
    given = {"input_ids": inputs["input_ids"][:1], "pixel_values": official["pixels_hd"][0]}
    output, seen = run(model, given | {"visual_layout": torch.tensor([[0, 1, 2]])})
    visual, text = seen["prefusion"]
    close(visual[:, -1:], official["hd.prefused_vision"])
    close(text[0], official["hd.fused_text_infer"][0, official["input_ids"][0] != -200])
    close(output.logits, official["hd.logits_infer"])


@pytest.mark.parametrize("chunk", [1, 2, 32])
def test_video(model, inputs, official, chunk):
    """Three frames: a visual token each, and text averaged over them."""
    ids = inputs["input_ids"][0]
    slot = int((ids == 127).nonzero())
    ids = torch.cat([ids[:slot], ids.new_full((3,), 127), ids[slot + 1 :]])
    model.config.frames_per_chunk = chunk
    given = {"input_ids": ids[None], "pixel_values": official["pixels_video"].flatten(0, 2)}
    output, _ = run(model, given | {"visual_layout": torch.tensor([[0, 3, 1]])})
    close(output.logits, official["video.logits_infer"])


def test_generation(model, inputs, official):
    first = {name: tensor[:1] for name, tensor in inputs.items()}
    new = model.generate(**first, max_new_tokens=8, do_sample=False, eos_token_id=None)[
        :, first["input_ids"].shape[1] :
    ]
    assert new.tolist() == official["image.generated"].tolist()
