from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

from llava_mini.prefusion import Prefusion


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return LlamaModel._from_config(config, attn_implementation="eager").eval()


@pytest.fixture
def prefusion(decoder):
    module = Prefusion(decoder, 2).eval()
    module.copy_layers(decoder.layers)
    return module


def tokens(count, seed):
    return torch.randn(2, count, 16, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_it_is_the_decoder_without_its_norm(decoder, prefusion):
    """With the decoder's own layers, what pre-fusion returns is the decoder's last state ahead of the final norm."""
    visual, text = tokens(5, 1), tokens(4, 2)
    fused = torch.cat(prefusion(visual, text, torch.ones(2, 4, dtype=torch.bool), decoder.rotary_emb), dim=1)
    expected = decoder(inputs_embeds=torch.cat([visual, text], dim=1)).last_hidden_state
    torch.testing.assert_close(decoder.norm(fused), expected)
    assert not torch.allclose(fused, expected)


def test_positions_count_fusable_tokens(decoder, prefusion):
    """Conformance 5: the first fusable text position follows the visual tokens; the count skips what is masked."""
    seen = []
    prefusion.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    fusable = torch.tensor([[True, True, False, True], [False, False, True, True]])
    prefusion(tokens(5, 1), tokens(4, 2), fusable, decoder.rotary_emb)
    assert seen[0].tolist() == [[0, 1, 2, 3, 4, 5, 6, 1, 7], [0, 1, 2, 3, 4, 1, 1, 5, 6]]


@torch.no_grad()
def test_masked_text_is_as_if_absent(decoder, prefusion):
    visual, text = tokens(5, 1), tokens(4, 2)
    fusable = torch.tensor([[True, False, True, False]] * 2)
    fused_visual, fused_text = prefusion(visual, text, fusable, decoder.rotary_emb)
    kept_visual, kept_text = prefusion(visual, text[:, [0, 2]], fusable[:, [0, 2]], decoder.rotary_emb)
    assert torch.equal(fused_text[:, [1, 3]], text[:, [1, 3]])
    torch.testing.assert_close(fused_text[:, [0, 2]], kept_text)
    torch.testing.assert_close(fused_visual, kept_visual)


@torch.no_grad()
def test_it_may_be_deeper_than_the_decoder():
    """Qwen2's layers read their kind from a list as long as the decoder."""
    fields = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    decoder = Qwen2Model(Qwen2Config(num_attention_heads=2, num_key_value_heads=2, **fields))
    visual, text = Prefusion(decoder, 5)(tokens(5, 1), tokens(4, 2), torch.ones(2, 4) > 0, decoder.rotary_emb)
    assert (visual.shape, text.shape) == ((2, 5, 16), (2, 4, 16))
