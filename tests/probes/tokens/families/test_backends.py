"""Every family through nnsight, and through TransformerLens where it knows the family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import llava_mini.transformer_lens  # noqa: F401
from probes import TokenMap, record_attention
from tests.probes.tokens.families.boxes import Picture
from tests.probes.tokens.families.build import FAMILIES, tiny

# To transformer-lens 4.3 without torchvision.
KNOWN = ("llava", "llava_next", "llava_onevision", "llava_mini", "idefics3", "gemma3")


def agree(model: PreTrainedModel, inputs: Any, backend: str) -> None:
    """Over a prompt and three steps."""
    tokens = TokenMap.from_inputs(model, inputs)
    told = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with record_attention(model, tokens) as ours:
        answer = model.generate(**inputs, **told)
    with record_attention(model, tokens, backend=backend) as theirs:
        assert torch.equal(model.generate(**inputs, **told), answer)
    assert torch.equal(theirs.queries, ours.queries)
    for name in ("mass", "entropy", "received"):
        torch.testing.assert_close(getattr(theirs, name), getattr(ours, name), rtol=0, atol=1e-5, equal_nan=True)


def inputs_of(family: str) -> dict[str, Any]:
    pictures = [[Picture(40, 24)], [], [Picture(24, 32), Picture(33, 30)]]
    images = [[picture.image for picture in row] for row in pictures]
    return dict(tiny(family)(["see # ?", "there is nothing to see", "the first # and then # of these"], images))


@pytest.mark.parametrize("family", FAMILIES)
def test_nnsight(family: str) -> None:
    agree(tiny(family).model(), inputs_of(family), "nnsight")


@pytest.mark.parametrize("family", FAMILIES)
def test_transformer_lens(family: str) -> None:
    if family in KNOWN:
        agree(tiny(family).model(), inputs_of(family), "transformer_lens")
    else:
        with pytest.raises((ValueError, ImportError), match=r"no adapter for|needs the optional torchvision"):
            agree(tiny(family).model(), inputs_of(family), "transformer_lens")
