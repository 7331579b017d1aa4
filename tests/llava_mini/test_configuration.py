"""Fields of the configuration and their limits."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from llava_mini import LlavaMiniConfig


def test_auto_config_loads_a_saved_config_unchanged(tmp_path):
    config = LlavaMiniConfig(
        compressor="average", compressor_size=3, prefusion_layers=2, prefusion_init="language_model"
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LlavaMiniConfig
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()


def test_num_visual_tokens_follows_the_compressor():
    assert LlavaMiniConfig().num_visual_tokens(576) == 1
    assert LlavaMiniConfig(compressor_size=8).num_visual_tokens(576) == 64
    assert LlavaMiniConfig(compressor="none").num_visual_tokens(576) == 576
    assert LlavaMiniConfig(compressor_size=2, prefusion_layers=0, keep_patches=True).num_visual_tokens(576) == 580


@pytest.mark.parametrize(("layers", "width"), [(-2, 1024), ([-2, -5], 2048)])
def test_vision_width_concatenates_the_selected_layers(layers, width):
    assert LlavaMiniConfig(vision_feature_layer=layers).vision_width == width


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compressor": "qurey"}, r"compressor .*query.*'qurey'"),
        ({"compressor_size": -1}, "compressor_size .*at least 0.*-1"),
        ({"compressor_size": 0, "prefusion_layers": 0}, "compressor_size=0 with prefusion_layers=0"),
        ({"compressor_attention": "eager"}, "compressor_attention .*multi_head, bare.*'eager'"),
        ({"compressor_heads": 0}, "compressor_heads .*at least 1.*0"),
        ({"prefusion_layers": -1}, "prefusion_layers .*at least 0.*-1"),
        ({"prefusion_layers": "4"}, "prefusion_layers .*at least 0.*'4'"),
        ({"vision_feature_layer": -26}, "vision_feature_layer .*-25 to 24 .*-26"),
        ({"vision_feature_layer": [1, 25]}, r"vision_feature_layer .*-25 to 24 .*\[1, 25\]"),
        ({"keep_patches": True}, "keep_patches=True needs .*prefusion_layers=4"),
        (
            {"keep_patches": True, "prefusion_layers": 0, "compressor": "none"},
            "keep_patches=True needs .*compressor='none'",
        ),
        (
            {"keep_patches": True, "prefusion_layers": 0, "compressor_size": 0},
            "keep_patches=True needs .*compressor_size=0",
        ),
        ({"prefusion_init": "lm"}, "prefusion_init .*'language_model'.*'lm'"),
        ({"prefusion_init": "language_model", "prefusion_layers": 33}, "'language_model' .*32 layers.*33"),
        (
            {"prefusion_init": "identity", "prefusion_layers": 33},
            "'identity' .*32 layers.*33",
        ),
    ],
)
def test_config_with_a_wrong_value_raises_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        LlavaMiniConfig(**fields)
    assert "\n" not in str(error.value)
