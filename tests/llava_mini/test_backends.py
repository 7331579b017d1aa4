"""Attention records of LLaVA-Mini's two stacks: nnsight and TransformerLens against our own recorder."""

from __future__ import annotations

import pytest
import torch

import llava_mini.transformer_lens  # noqa: F401
from probes import TokenMap
from probes.attention.recording import record_attention


@torch.no_grad()
@pytest.mark.parametrize("stack", ["decoder", "prefusion"])
@pytest.mark.parametrize("backend", ["nnsight", "transformer_lens"])
def test_record_attention_of_a_video_and_an_image_is_the_same_with_every_backend(tiny_mini, sample, backend, stack):
    """The batch has two rows with texts of different lengths, and five frames in chunks of two."""
    model = tiny_mini(frames_per_chunk=2, attention="sdpa")
    (video, _), (image, _) = sample(16, 6, seed=1), sample(4, 5, seed=2)
    width = len(video)
    rows = [video, torch.nn.functional.pad(image, (width - len(image), 0))]
    inputs = {
        "input_ids": torch.stack(rows),
        "attention_mask": torch.stack([(torch.arange(width) >= width - len(row)).long() for row in (video, image)]),
        "pixel_values": torch.randn(5, 3, 24, 24, generator=torch.Generator().manual_seed(0)),
        "visual_layout": torch.tensor([[0, 4, 1], [1, 1, 1]]),
    }
    tokens = TokenMap.from_inputs(model, inputs)
    if stack == "prefusion":
        # Each sequence has the frame's 16 patches and 4 visual tokens, then its row's text.
        labels = torch.full((5, 26), tokens.index("vision"))
        labels[:, 20:] = tokens.index("instruction")
        labels[4, 25:] = tokens.index("pad")
        tokens = TokenMap(labels, stack="prefusion")
    with record_attention(model, tokens) as ours:
        expected = model(**inputs).logits
    with record_attention(model, tokens, backend=backend) as theirs:
        logits = model(**inputs).logits
    is_token = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[is_token], expected[is_token], rtol=0, atol=1e-5)
    assert torch.equal(theirs.queries, ours.queries)
    for name in ("mass", "entropy", "received"):
        torch.testing.assert_close(getattr(theirs, name), getattr(ours, name), rtol=0, atol=1e-5, equal_nan=True)
    assert model.config.frames_per_chunk == 2
