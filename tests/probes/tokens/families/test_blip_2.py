"""Visual layout of BLIP-2, whose own processor puts the query tokens before each text."""

from __future__ import annotations

import pytest
import torch
import transformers

from probes import TokenMap, record_attention
from tests.probes.tokens.families.boxes import CoordinateImage
from tests.probes.tokens.families.build import tiny
from tests.probes.tokens.families.test_all import check_statistics, statistics_from_matrices


def test_blip_2_layout_returns_query_tokens_that_share_the_image() -> None:
    family, images = tiny("blip_2"), [CoordinateImage(97, 60).image, CoordinateImage(40, 133).image]
    inputs, model = family(["#a#"], [images]), family.model()
    tokens = TokenMap.from_inputs(model, inputs, family.processor, images)
    places, vision = tokens.require_places(), tokens.mask("vision")
    assert places.image[vision].tolist() == [0] * 4 + [1] * 4
    assert places.row[vision].tolist() == [0] * 8
    assert places.column[vision].tolist() == 2 * [0, 1, 2, 3]
    assert places.box[vision].tolist() == [[0, 0, 97, 60]] * 4 + [[0, 0, 40, 133]] * 4
    assert TokenMap.from_inputs(model, inputs).require_places().box.isnan().all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_record_attention_of_blip_2_with_own_query_tokens_equals_eager_attention(side: str) -> None:
    """The query tokens come before the padding, so padding on the left lies inside a row."""
    family, images = tiny("blip_2"), [CoordinateImage(40, 24).image, CoordinateImage(24, 32).image]
    processor = transformers.Blip2Processor(
        family.processor.image_processor, family.processor.tokenizer, num_query_tokens=4
    )
    inputs = processor(images, ["what is it", "why"], return_tensors="pt", padding=True, padding_side=side)
    tokens = TokenMap.from_inputs(family.model(), inputs, processor, images)
    assert torch.equal(tokens.mask("vision")[:, :4], torch.ones(2, 4, dtype=torch.bool))
    assert tokens.mask("pad")[1, 4 if side == "left" else -1]
    model = family.model()
    with torch.no_grad(), record_attention(model, tokens) as attention:
        model(**inputs)
    with torch.no_grad():
        output = family.model("eager")(**inputs, output_attentions=True).language_model_outputs
    expected = statistics_from_matrices(torch.stack(output.attentions), tokens.labels, tokens, attention.targets)
    check_statistics(attention, expected)


def test_find_decoder_of_blip_2_with_encoder_decoder_raises() -> None:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = {"model_type": "t5", "d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 2, "d_kv": 8, "vocab_size": 99}
    config = transformers.Blip2Config(
        vision_config=vision | {"image_size": 8, "patch_size": 4},
        qformer_config=vision | {"encoder_hidden_size": 16},
        text_config=text,
        num_query_tokens=2,
        image_token_index=98,
    )
    model = transformers.Blip2ForConditionalGeneration(config)
    inputs = {"input_ids": torch.tensor([[98, 98, 5]])}
    with pytest.raises(ValueError, match="T5Stack cannot be probed: it has no decoder layers with a self_attn"):
        record_attention(model, TokenMap.from_inputs(model, inputs)).__enter__()


def test_blip_2_layout_with_mismatched_inputs_raises_value_error() -> None:
    family, image = tiny("blip_2"), CoordinateImage(30, 30).image
    inputs, model = dict(family(["#"], [[image]])), family.model()
    with pytest.raises(ValueError, match=r"hold 1 images.*2 images or image_sizes"):
        TokenMap.from_inputs(model, inputs, images=[image, image])
    with pytest.raises(ValueError, match=r"images have 4 visual tokens.*input_ids hold 3"):
        TokenMap.from_inputs(model, inputs | {"input_ids": inputs["input_ids"][:, -3:], "attention_mask": None})
