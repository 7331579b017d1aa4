"""Lens, relevancy and figures on every family: against its own logits, its own eager attention, and its own places."""

from __future__ import annotations

import pytest
import torch

from probes import TokenMap
from probes.attribution import relevancy
from probes.plots import plot_patches
from probes.readouts.logit_lens import logit_lens
from tests.probes.tokens.families.boxes import Picture
from tests.probes.tokens.families.build import FAMILIES, tiny

PICTURES = [[Picture(40, 24)], [Picture(24, 32), Picture(33, 30)]]
IMAGES = [[picture.image for picture in row] for row in PICTURES]


@pytest.mark.parametrize("family", FAMILIES)
def test_lens_and_relevancy(family: str) -> None:
    torch.manual_seed(0)
    built, model = tiny(family), tiny(family).model().eval()
    inputs = dict(built(["see # ?", "the first # and then # of these"], IMAGES))
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), logit_lens(model, tokens, top=1) as lens:
        logits = model(**inputs).logits[tokens.labels != tokens.index("pad")].float()
    torch.testing.assert_close(lens.logprobs[-1], logits.log_softmax(-1).amax(-1, keepdim=True), rtol=0, atol=1e-5)

    found = relevancy(model, tokens, inputs)
    rows = torch.arange(len(found.at))
    model.set_attn_implementation("eager")
    output = model(**inputs, output_attentions=True, use_cache=False)
    slopes = torch.autograd.grad(output.logits[rows, found.at, found.answers].sum(), output.attentions)
    rollout = torch.eye(tokens.labels.shape[1]).expand(len(rows), -1, -1)
    for weights, slope in zip(output.attentions, slopes, strict=True):
        rollout = rollout + (weights * slope).clamp(min=0).mean(1) @ rollout
    torch.testing.assert_close(found.rollout, rollout[rows, found.at], rtol=1e-3, atol=1e-6)

    figure = plot_patches(IMAGES[1][1], tokens, {"relevancy": found.rollout[1]}, sample=1, image=1)
    figure.draw_without_rendering()
