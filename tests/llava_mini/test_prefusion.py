"""Pre-fusion layers, against the decoder that they are built from."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from transformers import Gemma3TextConfig, Gemma3TextModel, LlamaModel, Qwen2Config, Qwen2Model

from llava_mini.prefusion import Prefusion
from tests.tiny_models import tiny_text_config

SMALL = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    config = tiny_text_config(**SMALL, initializer_range=0.3)
    return LlamaModel._from_config(config, attn_implementation="eager").eval()


@pytest.fixture
def prefusion(decoder):
    module = Prefusion(decoder, 2).eval()
    module.copy_layers(decoder.layers)
    return module


def random_tokens(count, seed):
    return torch.randn(2, count, 16, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_prefusion_with_the_decoders_layers_equals_the_decoder_without_its_norm(decoder, prefusion):
    """Its output is the decoder's last state ahead of the final norm."""
    visual, text = random_tokens(5, 1), random_tokens(4, 2)
    fused = torch.cat(prefusion(visual, text, decoder.rotary_emb), dim=1)
    expected = decoder(inputs_embeds=torch.cat([visual, text], dim=1)).last_hidden_state
    torch.testing.assert_close(decoder.norm(fused), expected)
    assert not torch.allclose(fused, expected)


@torch.no_grad()
def test_prefusion_output_does_not_depend_on_later_tokens(decoder, prefusion):
    visual, text = random_tokens(5, 1), random_tokens(4, 2)
    other = torch.cat([text[:, :2], random_tokens(2, 3)], dim=1)
    one, two = prefusion(visual, text, decoder.rotary_emb), prefusion(visual, other, decoder.rotary_emb)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1][:, :2], two[1][:, :2])
    assert not torch.equal(one[1][:, 2:], two[1][:, 2:])


@torch.no_grad()
@pytest.mark.parametrize("unread", [0, 3, 5])
def test_prefusion_with_a_past_reuses_the_visual_tokens_for_any_text(decoder, prefusion, unread):
    """The past may be filled in one call or in parts, with text or without."""
    visual, text, other = random_tokens(5, 1), random_tokens(4, 2), random_tokens(3, 3)
    rotary_emb = decoder.rotary_emb
    expected = [prefusion(visual, x, rotary_emb) for x in (text, other)]
    past = []
    read, fused_text = prefusion(visual, text, rotary_emb, unread=unread, past=past)
    torch.testing.assert_close(read, expected[0][0][:, unread:])
    torch.testing.assert_close(fused_text, expected[0][1])
    parts = []
    prefusion(visual[:, :2], text[:, :0], rotary_emb, unread=2, past=parts)
    prefusion(visual[:, 2:], text, rotary_emb, unread=max(unread - 2, 0), past=parts)
    for filled_past in (past, parts):
        assert {states.shape for pair in filled_past for states in pair} == {(2, 2, 5, 8)}
        for x, (_, fused) in zip((text, other), expected, strict=True):
            torch.testing.assert_close(prefusion(visual[:, :0], x, rotary_emb, past=filled_past)[1], fused)


@torch.no_grad()
def test_prefusion_may_have_more_layers_than_the_decoder():
    """Qwen2's layers look up their type in a list as long as the decoder."""
    decoder = Qwen2Model(tiny_text_config(Qwen2Config, **SMALL))
    visual, text = Prefusion(decoder, 5)(random_tokens(5, 1), random_tokens(4, 2), decoder.rotary_emb)
    assert (visual.shape, text.shape) == ((2, 5, 16), (2, 4, 16))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_prefusion_uses_windows_and_rotations_of_each_layer_type(attention):
    """Gemma 3 alternates sliding windows and full attention, each with its own rotation."""
    torch.manual_seed(0)
    fields = {"num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4}
    layer_types = ["sliding_attention", "sliding_attention", "full_attention"]
    fields |= {"layer_types": layer_types, "initializer_range": 0.3}
    config = tiny_text_config(Gemma3TextConfig, **SMALL | fields)
    decoder = Gemma3TextModel._from_config(config, attn_implementation=attention).eval()
    prefusion = Prefusion(decoder, 3).eval()
    prefusion.copy_layers(decoder.layers)
    visual, text = random_tokens(5, 1), random_tokens(4, 2)
    fused = torch.cat(prefusion(visual, text, decoder.rotary_emb), dim=1)
    expected = decoder(inputs_embeds=torch.cat([visual, text], dim=1)).last_hidden_state
    torch.testing.assert_close(decoder.norm(fused), expected)


def test_load_file_copies_every_parameter(decoder, tmp_path):
    source = Prefusion(decoder, 2)
    weights = {name: torch.randn_like(p) for name, p in source.layers.named_parameters()}
    save_file(weights, tmp_path / "layers.safetensors")
    prefusion = Prefusion(decoder, 2)
    prefusion.load_file(tmp_path / "layers.safetensors")
    for name, parameter in prefusion.layers.named_parameters():
        assert torch.equal(parameter, weights[name])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda weights: weights.pop("1.mlp.up_proj.weight"), r"holds no 1\.mlp\.up_proj\.weight"),
        (
            lambda weights: weights.update({"0.input_layernorm.weight": torch.ones(3)}),
            r"0\.input_layernorm\.weight .* \[3\], not \[16\]",
        ),
    ],
)
def test_load_file_with_a_missing_or_misshapen_parameter_raises(decoder, tmp_path, damage, message):
    prefusion = Prefusion(decoder, 2)
    weights = dict(prefusion.layers.state_dict())
    damage(weights)
    save_file(weights, tmp_path / "layers.safetensors")
    with pytest.raises(ValueError, match=message):
        prefusion.load_file(tmp_path / "layers.safetensors")


def test_load_file_that_is_missing_or_not_safetensors_raises(decoder, tmp_path):
    prefusion = Prefusion(decoder, 1)
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.safetensors"):
        prefusion.load_file(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.safetensors .*safetensors file"):
        prefusion.load_file(tmp_path / "text.safetensors")
