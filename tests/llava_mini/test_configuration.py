from __future__ import annotations

import pytest
from transformers import AutoConfig

from llava_mini import LlavaMiniConfig


def test_round_trip_through_auto(tmp_path):
    config = LlavaMiniConfig(
        compressor="average", compressor_size=3, prefusion_layers=2, prefusion_init="language_model"
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LlavaMiniConfig
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()


def test_number_of_visual_tokens():
    assert LlavaMiniConfig().num_visual_tokens(576) == 1
    assert LlavaMiniConfig(compressor_size=8).num_visual_tokens(576) == 64
    assert LlavaMiniConfig(compressor="none").num_visual_tokens(576) == 576
    assert LlavaMiniConfig(compressor_size=2, prefusion_layers=0, keep_patches=True).num_visual_tokens(576) == 580


@pytest.mark.parametrize(("layers", "width"), [(-2, 1024), ([-2, -5], 2048)])
def test_vision_width_counts_the_selected_layers(layers, width):
    assert LlavaMiniConfig(vision_feature_layer=layers).vision_width == width


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compressor": "qurey"}, "compressor must be 'none' or one of .*query.*; got 'qurey'"),
        ({"compressor_size": -1}, "compressor_size must be an integer of at least 0; got -1"),
        ({"compressor_size": 0, "prefusion_layers": 0}, "leaves the picture no way to the language model"),
        ({"compressor_attention": "eager"}, "compressor_attention must be one of multi_head, bare; got 'eager'"),
        ({"compressor_heads": 0}, "compressor_heads must be an integer of at least 1; got 0"),
        ({"prefusion_layers": -1}, "prefusion_layers must be an integer of at least 0; got -1"),
        ({"prefusion_layers": "4"}, "prefusion_layers must be an integer of at least 0; got '4'"),
        ({"keep_patches": True}, "keep_patches puts patches beside compressed tokens .* and prefusion_layers=0"),
        ({"keep_patches": True, "prefusion_layers": 0, "compressor": "none"}, "give a compressor"),
        ({"keep_patches": True, "prefusion_layers": 0, "compressor_size": 0}, "compressor_size of at least 1"),
        ({"prefusion_init": "lm"}, "must be 'fresh', 'language_model', 'identity' or a .safetensors file; got 'lm'"),
        ({"prefusion_init": "language_model", "prefusion_layers": 33}, "at most the language model's 32 layers"),
        (
            {"prefusion_init": "identity", "prefusion_layers": 33},
            "'identity' copies at most the language model's 32 layers",
        ),
    ],
)
def test_a_wrong_value_is_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        LlavaMiniConfig(**fields)
    assert "\n" not in str(error.value)
