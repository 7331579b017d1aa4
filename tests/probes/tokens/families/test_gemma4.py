"""Visual layout of Gemma 4, and its last layers, which run on the last position alone in `generate`."""

from __future__ import annotations

import pytest
import torch

from probes import PatchActivations, TokenMap, intervene
from probes.hooks.decoder import decoder_layers, find_decoder
from tests.probes.tokens.families.boxes import CoordinateImage, check_boxes
from tests.probes.tokens.families.build import LAYERS, tiny


@pytest.mark.parametrize("side", ["left", "right"])
def test_gemma4_layout_boxes_match_pixels(side: str) -> None:
    """Images are wide, tall and square, and two of them are in one row."""
    rows = {"a#b": [(97, 60)], "#": [(23, 75)], "#and#in one row": [(120, 31), (30, 30)]}
    tokens = check_boxes(tiny("gemma4"), rows, side)
    assert tokens.require_places().image.amax(1).tolist() == [0, 0, 1]


def test_gemma4_layout_with_mismatched_inputs_raises_value_error() -> None:
    family, image = tiny("gemma4"), CoordinateImage(30, 30).image
    inputs, model = dict(family(["#"], [[image]])), family.model()
    with pytest.raises(ValueError, match=r"hold 1 images.*2 images or image_sizes"):
        TokenMap.from_inputs(model, inputs, images=[image, image])
    with pytest.raises(ValueError, match="inputs have no image_position_ids"):
        TokenMap.from_inputs(model, inputs | {"image_position_ids": None})


def test_patch_activations_in_generation_patches_all_positions_of_layers_that_share_keys() -> None:
    family = tiny("gemma4")
    inputs, model = dict(family(["#what"], [[CoordinateImage(30, 30).image]])), family.model()
    tokens = TokenMap.from_inputs(model, inputs)
    lengths: list[int] = []
    last = decoder_layers(find_decoder(model))[LAYERS - 1]
    last.register_forward_hook(lambda layer, args, output: lengths.append(output.shape[1]))
    plain = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    with intervene(model, tokens, PatchActivations("vision", [LAYERS - 1], "residual", "zero")) as receipt:
        patched = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    whole = tokens.labels.shape[1]
    assert lengths in ([1, whole], [whole, whole])  # transformers 5.17 runs all positions also without the patch
    assert receipt[0].tokens == {LAYERS - 1: int(tokens.mask("vision").sum())}
    assert torch.equal(plain, patched), "no position attends to another one after the last layer"


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_token_map_with_audio_tokens_raises_value_error(name: str) -> None:
    """Audio would count as text."""
    family, image = tiny(name), CoordinateImage(30, 30).image
    inputs, model = dict(family(["#ab"], [[image]])), family.model()
    model.config.audio_token_id = int(inputs["input_ids"][0, -1])
    with pytest.raises(ValueError, match=rf"hold audio tokens \({model.config.audio_token_id}\)"):
        TokenMap.from_inputs(model, inputs)
