"""Logit lens, relevancy and patch figures on every model family, against its own logits and eager attention."""

from __future__ import annotations

import pytest
import torch

from probes import TokenMap
from probes.attribution import relevancy
from probes.plots import plot_patches
from probes.readouts.logit_lens import logit_lens
from tests.probes.tokens.families.boxes import CoordinateImage
from tests.probes.tokens.families.build import MODEL_FAMILIES, tiny
from tests.probes.tokens.families.tiny_family import attentions

COORDINATE_IMAGES = [[CoordinateImage(40, 24)], [CoordinateImage(24, 32), CoordinateImage(33, 30)]]
IMAGES = [[image.image for image in row] for row in COORDINATE_IMAGES]


# Families whose layers cannot be run one by one to follow gradients.
NO_RELEVANCY = {"gemma4": "layers of Gemma4TextModel share keys"}


@pytest.mark.parametrize("family", [family for family in MODEL_FAMILIES if family != "gemma3n"])
def test_logit_lens_and_relevancy_equal_logits_and_eager_gradients(family: str) -> None:
    torch.manual_seed(0)
    model = tiny(family).model().eval()
    inputs = dict(tiny(family)(["see # ?", "the first # and then # of these"], IMAGES))
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), logit_lens(model, tokens, top=1) as lens:
        logits = model(**inputs).logits[tokens.labels != tokens.index("pad")].float()
    torch.testing.assert_close(lens.logprobs[-1], logits.log_softmax(-1).amax(-1, keepdim=True), rtol=0, atol=1e-5)

    if family in NO_RELEVANCY:
        with pytest.raises(ValueError, match=NO_RELEVANCY[family]):
            relevancy(model, tokens, inputs)
        return
    result = relevancy(model, tokens, inputs)
    rows = torch.arange(len(result.at))
    model.set_attn_implementation("eager")
    output = model(**inputs, output_attentions=True, use_cache=False)
    gradients = torch.autograd.grad(output.logits[rows, result.at, result.answers].sum(), attentions(output))
    rollout = torch.eye(tokens.labels.shape[1]).expand(len(rows), -1, -1)
    for weights, gradient in zip(attentions(output), gradients, strict=True):
        rollout = rollout + (weights * gradient).clamp(min=0).mean(1) @ rollout
    torch.testing.assert_close(result.rollout, rollout[rows, result.at], rtol=1e-3, atol=1e-6)

    figure = plot_patches(IMAGES[1][1], tokens, {"relevancy": result.rollout[1]}, sample=1, image=1)
    figure.draw_without_rendering()
