"""Outputs of the official code (ictnlp/LLaVA-Mini at 47da113, float32, eager), reproduced from the same weights."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(official_model, request):
    official_model.set_attn_implementation(request.param)
    return official_model


@pytest.fixture(scope="module")
def inputs(official):
    """Return the official inputs with our placeholder for their -200; with C = 1 each image has one."""
    input_ids = official["input_ids"].masked_fill(official["input_ids"] == -200, 127)
    # In the text the official code would mask id 0, which ours does not, and ours would read id 127 as a second image.
    assert not torch.isin(official["input_ids"], torch.tensor([0, 127])).any()
    return {"input_ids": input_ids, "pixel_values": official["pixels_image"].squeeze(1)}


@torch.no_grad()
def run(model, inputs, labels=None):
    """Run the model and return its output, and the outputs of the compressor and of pre-fusion by name."""
    recorded = {}
    handles = [
        module.register_forward_hook(lambda *call, name=name: recorded.update({name: call[-1]}))
        for name, module in (("compressor", model.model.compressor), ("prefusion", model.model.prefusion))
    ]
    try:
        return model(**inputs, labels=labels), recorded
    finally:
        for handle in handles:
            handle.remove()


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_look_at_equals_the_official_features(model, inputs, official):
    with torch.no_grad():
        assert_close(model.model.look_at(inputs["pixel_values"]).features[..., :64], official["clip_features"])


def test_compressor_equals_the_official_tokens_and_weights(model, inputs, official):
    tokens, weights = run(model, inputs)[1]["compressor"]
    assert_close(tokens, official["compressor_out"])
    assert_close(weights, official["compressor_attention"])


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_forward_equals_the_official_prefusion_and_logits(model, inputs, official, mode):
    output, recorded = run(model, inputs, official["labels"] if mode == "train" else None)
    visual, text = recorded["prefusion"]
    is_text = official["input_ids"] != -200
    assert_close(visual[:, -1:], official["image.prefused_vision"])
    assert_close(output.image_hidden_states, official["image.prefused_vision"].flatten(0, 1))
    is_compared = is_text & (official["labels"] == -100 if mode == "train" else is_text)
    for row in range(2):
        assert_close(text[row, : is_compared[row].sum()], official[f"image.fused_text_{mode}"][row, is_compared[row]])
    assert_close(output.logits, official[f"image.logits_{mode}"])
    if mode == "train":
        assert_close(output.loss, official["image.loss_train"])


def test_forward_of_tiles_equals_the_official_outputs(model, inputs, official):
    """The image has four tiles and the whole, and one visual token."""
    inputs = {"input_ids": inputs["input_ids"][:1], "pixel_values": official["pixels_hd"][0]}
    output, recorded = run(model, inputs | {"visual_layout": torch.tensor([[0, 1, 2]])})
    visual, text = recorded["prefusion"]
    assert_close(visual[:, -1:], official["hd.prefused_vision"])
    assert_close(text[0], official["hd.fused_text_infer"][0, official["input_ids"][0] != -200])
    assert_close(output.logits, official["hd.logits_infer"])


@pytest.mark.parametrize("chunk", [1, 2, 32])
def test_forward_of_a_video_equals_the_official_logits(model, inputs, official, chunk):
    """Each of three frames has a visual token, and the text is averaged over them."""
    ids = inputs["input_ids"][0]
    position = int((ids == 127).nonzero())
    ids = torch.cat([ids[:position], ids.new_full((3,), 127), ids[position + 1 :]])
    model.config.frames_per_chunk = chunk
    inputs = {"input_ids": ids[None], "pixel_values": official["pixels_video"].flatten(0, 2)}
    output, _ = run(model, inputs | {"visual_layout": torch.tensor([[0, 3, 1]])})
    assert_close(output.logits, official["video.logits_infer"])


def test_generate_equals_the_official_tokens(model, inputs, official):
    first_row = {name: tensor[:1] for name, tensor in inputs.items()}
    generated = model.generate(**first_row, max_new_tokens=8, do_sample=False, eos_token_id=None)[
        :, first_row["input_ids"].shape[1] :
    ]
    assert generated.tolist() == official["image.generated"].tolist()
