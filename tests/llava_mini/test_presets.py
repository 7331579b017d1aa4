"""Presets: the paper's equations, written out, where they differ from the released code."""

from __future__ import annotations

import pytest
import torch

from llava_mini import PRESETS, LlavaMiniConfig
from llava_mini.compressors.position_tables import sincos_table


def test_config_default_is_the_code_preset():
    config = LlavaMiniConfig()
    assert {name: getattr(config, name) for name in PRESETS["code"]} == PRESETS["code"]
    assert PRESETS["code"].keys() == PRESETS["paper"].keys()


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2])
def test_paper_preset_equals_equations_2_and_3(tiny_mini, sample, size):
    """Check both equations.

    Equation 2: H is projected, and softmax((Q + PE)(H + PE)^T) H is the language model's input. Equation 3: pre-fusion
    of [H | text] returns the text.
    """
    mini = tiny_mini(compressor_size=size, **PRESETS["paper"])
    ids, pixels = sample(size * size, 5)
    embeds, tokens = mini.model.fuse(ids[None], pixels[None])

    model, width = mini.model, 24
    h = model.multi_modal_projector(model.look_at(pixels[None]).features)[0]
    scores = (model.compressor.query + sincos_table(size, width)) @ (h + sincos_table(4, width)).T
    expected = scores.softmax(-1) @ h
    torch.testing.assert_close(tokens, expected)
    torch.testing.assert_close(embeds[0, 2 : 2 + size * size], expected)
    text = ids[ids != 99]
    states = torch.cat([h, mini.get_input_embeddings()(text)])[None]
    rotary = model.language_model.rotary_emb(states, position_ids=torch.arange(states.shape[1])[None])
    causal = torch.full((states.shape[1],) * 2, float("-inf")).triu(1)[None, None]
    for layer in model.prefusion.layers:
        states = layer(states, attention_mask=causal, position_embeddings=rotary)
    torch.testing.assert_close(embeds[0, ids != 99], states[0, 16:])
    assert [name for name, _ in model.compressor.named_parameters()] == ["query"]


@torch.no_grad()
def test_each_field_of_the_paper_preset_changes_the_logits(tiny_mini, sample):
    ids, pixels = sample(4, 5)
    logits = [tiny_mini()(input_ids=ids[None], pixel_values=pixels[None]).logits]
    for name, value in PRESETS["paper"].items():
        model = tiny_mini(**{name: value})
        assert getattr(model.config, name) == value
        logits.append(model(input_ids=ids[None], pixel_values=pixels[None]).logits)
    for i, one in enumerate(logits):
        assert all(not torch.allclose(one, other, atol=1e-4) for other in logits[:i])


@pytest.mark.parametrize("detach", [False, True])
def test_detach_embeddings_blocks_their_gradient(tiny_mini, sample, detach):
    """Conformance 4: in the released training code no gradient reaches the embeddings; the paper trains them."""
    model = tiny_mini(detach_embeddings=detach).train()
    ids, pixels = sample(4, 8)
    labels = ids.clone()
    labels[:-3] = -100
    for inputs in ({"input_ids": ids[None], "pixel_values": pixels[None], "labels": labels[None]},):
        model(**inputs).loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert (gradient is None or not gradient.any()) is detach


def test_prefusion_init_from_a_file_copies_it_and_saves_without_it(tiny_mini, tmp_path):
    from safetensors.torch import save_file

    weights = {name: torch.randn_like(p) for name, p in tiny_mini().model.prefusion.layers.named_parameters()}
    save_file(weights, tmp_path / "layers.safetensors")
    model = tiny_mini(prefusion_init=str(tmp_path / "layers.safetensors"))
    for name, parameter in model.model.prefusion.layers.named_parameters():
        assert torch.equal(parameter, weights[name])
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "layers.safetensors").unlink()
    assert type(model).from_pretrained(tmp_path / "model")  # the saved model does not need the file
