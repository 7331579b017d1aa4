"""Interventions in LLaVA-Mini's pre-fusion layers, where the rows are frames that run in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llava_mini import LlavaMiniForConditionalGeneration as Mini
from probes.attention.recording import record_attention
from probes.interventions import BlockAttention, PatchActivations, RemoveTokens, intervene
from probes.readouts.hidden_states import record_states
from tests.probes.attention.test_prefusion import make_mini, map_of, video

__all__ = ["make_mini"]


@pytest.mark.parametrize("chunk", [1, 2, 8])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_block_attention_prefusion_any_chunks_blocks_edges(
    make_mini: Callable[..., Mini], implementation: str, chunk: int
) -> None:
    """In the first layer, the instruction has no attention on the patches; in the second it has."""
    model, inputs, tokens = make_mini(implementation, frames_per_chunk=chunk), video(3), map_of(3)
    knockout = BlockAttention("vision", "instruction", [0])
    with torch.no_grad(), intervene(model, tokens, knockout) as receipt, record_attention(model, tokens) as attention:
        model(**inputs)
    text, vision = attention.targets.index("instruction"), tokens.index("vision")
    assert attention.mass[0, :, :, text, vision].isnan().all()
    assert (attention.mass[1, :, :, text, vision] > 0).all()
    assert receipt[0].mass == {0: 0.0}
    assert receipt[0].tokens == {0: int(tokens.mask("instruction").sum())}
    assert receipt[0].calls == {0: {1: 4, 2: 2, 8: 1}[chunk]}


@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_remove_tokens_prefusion_drop_equals_mask(make_mini: Callable[..., Mini], chunk: int) -> None:
    """The logits of the language model are equal too; its own layers are unchanged."""
    model, inputs, tokens = make_mini(frames_per_chunk=chunk), video(3), map_of(3)
    logits = []
    with torch.no_grad():
        plain = model(**inputs).logits
        for how in ("mask", "drop"):
            with intervene(model, tokens, RemoveTokens("vision", [0, 1], how=how)) as receipt:
                logits.append(model(**inputs).logits)
            assert receipt[0].tokens == dict.fromkeys([0, 1], int(tokens.mask("vision").sum()))
    unpadded = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[0][unpadded], logits[1][unpadded], atol=2e-5, rtol=1e-5)
    assert (logits[0] - plain)[unpadded].abs().max() > 1e-3


@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_patch_activations_prefusion_patches_each_frame(make_mini: Callable[..., Mini], chunk: int) -> None:
    """Each frame gets its own values in chunks of any size, and its own states change nothing."""
    model, inputs, tokens = make_mini(frames_per_chunk=chunk), video(3), map_of(3)
    with torch.no_grad():
        with record_states(model, tokens, "vision", component="mlp") as states:
            plain = model(**inputs).logits
        with intervene(model, tokens, PatchActivations("vision", [0, 1], "mlp", states)):
            assert torch.equal(model(**inputs).logits, plain)
        shifted: Any = {0: states[0] + torch.arange(len(states[0]))[:, None]}
        patch = PatchActivations("vision", [0], "mlp", shifted)
        with intervene(model, tokens, patch), record_states(model, tokens, "vision", component="mlp") as patched:
            model(**inputs)
    assert torch.equal(patched[0], shifted[0])


def test_remove_tokens_prefusion_renumber_raises(make_mini: Callable[..., Mini]) -> None:
    removal = RemoveTokens("vision", [0], how="drop", positions="renumber")
    with pytest.raises(ValueError, match=r"Prefusion has no rotary_emb.*renumbered"):
        intervene(make_mini(), map_of(3), removal).__enter__()
