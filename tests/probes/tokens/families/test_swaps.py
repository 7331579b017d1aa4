"""Swaps of minimal pairs on every model family, against states patched in whole calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from PIL import ImageOps
from torch import Tensor

from probes import PatchActivations, TokenMap, intervene, record_states
from probes.hooks.decoder import decoder_layers, find_decoder
from probes.hooks.layer_io import input_states, replace_input_states
from probes.interventions.swapping import swap_images
from tests.probes.tokens.families.boxes import CoordinateImage
from tests.probes.tokens.families.build import HYBRID_FAMILIES, LAYERS, MODEL_FAMILIES, tiny

TEXTS = ["see # ?", "the first # and then # of these"]
IMAGES = [[CoordinateImage(40, 24)], [CoordinateImage(24, 32), CoordinateImage(33, 30)]]
ANSWERS = torch.tensor([[40, 50], [60, 45]])
# Their last layers attend to keys of earlier layers, which no patch of residual states changes.
SHARED_KEYS = ("gemma3n", "gemma4")
Expected = Callable[[int], Tensor]


class PairCase:
    """Model and inputs of a family: two pairs, whose second images have inverted colours."""

    def __init__(self, family: str, side: str) -> None:
        self.model = tiny(family).model()
        first = [[image.image for image in row] for row in IMAGES]
        second = [[ImageOps.invert(image) for image in row] for row in first]
        self.inputs = dict(tiny(family)([t for t in TEXTS for _ in range(2)], self.alternate(first, second), side))
        # The other image in every row, in a batch of its own.
        self.others = dict(tiny(family)([t for t in TEXTS for _ in range(2)], self.alternate(second, first), side))
        self.tokens = TokenMap.from_inputs(self.model, self.inputs)
        vision = self.tokens.mask("vision")
        self.text = ~self.tokens.mask("pad") & ~vision & (vision.cumsum(1) > 0)

    @staticmethod
    def alternate(first: list[Any], second: list[Any]) -> list[Any]:
        return [row for pair in zip(first, second, strict=True) for row in pair]

    @torch.no_grad()
    def difference(self, inputs: dict[str, Any], *interventions: Any) -> Tensor:
        """Return the logit of the other answer minus that of the own one, `[pairs, 2]`."""
        with intervene(self.model, self.tokens, *interventions):
            logits = self.model(**{**inputs, "use_cache": False}).logits
        last = self.tokens.mask("pad").logical_not().long().cumsum(1).argmax(1)
        at_answer = logits[torch.arange(4), last].unflatten(0, (2, 2))
        return (at_answer.gather(2, ANSWERS.flip(1)[..., None]) - at_answer.gather(2, ANSWERS[..., None]))[..., 0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", [*(name for name in MODEL_FAMILIES if name not in SHARED_KEYS), *HYBRID_FAMILIES])
def test_swap_images_equals_text_states_patched_in_whole_calls(family: str, side: str) -> None:
    """Text states of the own run in the run on the other image are visual states of the other image in the own run."""
    case = PairCase(family, side)
    swaps = swap_images(case.model, case.tokens, case.inputs, ANSWERS)
    with torch.no_grad(), record_states(case.model, case.tokens, case.text) as own:
        case.model(**{**case.inputs, "use_cache": False})
    for start in range(1, LAYERS + 1):
        patch = PatchActivations(case.text, [start - 1], "residual", own)
        expected = case.difference(case.others, patch)
        assert swaps.difference[start] == pytest.approx(expected.numpy(), abs=3e-4)
    assert swaps.difference[LAYERS] == pytest.approx(case.difference(case.inputs).numpy(), abs=3e-4)
    if family != "llava_mini":  # whose pre-fusion has put the own image into the text
        assert swaps.difference[0] == pytest.approx(case.difference(case.others).numpy(), abs=3e-4)
    assert abs(swaps.difference[0] - swaps.difference[LAYERS]).min() > 3e-3, "the images matter"


@contextmanager
def visual_states_from(case: PairCase, start: int) -> Iterator[None]:
    """Patch the visual states at the input of a layer, and the visual keys that later layers share, with the other run's."""
    layer = decoder_layers(find_decoder(case.model))[start]
    others: dict[str, Any] = {}

    def keep(layer: Any, args: Any, kwargs: Any) -> None:
        others.update(hidden=input_states(args, kwargs), shared=dict(kwargs["shared_kv_states"]))

    def patch(layer: Any, args: Any, kwargs: Any) -> Any:
        vision = ~case.text
        for name, own in kwargs["shared_kv_states"].items():
            mixed = (
                torch.where(vision[:, None, :, None], b, a) for a, b in zip(own, others["shared"][name], strict=True)
            )
            kwargs["shared_kv_states"][name] = tuple(mixed)
        hidden = torch.where(vision[..., None], others["hidden"], input_states(args, kwargs))
        return replace_input_states(args, kwargs, hidden)

    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    case.model(**{**case.others, "use_cache": False})
    handle.remove()
    handle = layer.register_forward_pre_hook(patch, with_kwargs=True)
    yield
    handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("family", SHARED_KEYS)
def test_swap_images_of_layers_that_share_keys_equals_visual_states_and_keys_patched_in_whole_calls(
    family: str,
) -> None:
    case = PairCase(family, "left")
    swaps = swap_images(case.model, case.tokens, case.inputs, ANSWERS)
    for start in range(1, LAYERS):  # the inputs of each layer that Gemma 4 makes of an image come with its states
        with visual_states_from(case, start):
            expected = case.difference(case.inputs)
        assert swaps.difference[start] == pytest.approx(expected.numpy(), abs=3e-4)
    assert swaps.difference[0] == pytest.approx(case.difference(case.others).numpy(), abs=3e-4)
    assert swaps.difference[LAYERS] == pytest.approx(case.difference(case.inputs).numpy(), abs=3e-4)
    assert abs(swaps.difference[0] - swaps.difference[LAYERS]).min() > 3e-3, "the images matter"
