"""Tiny random LLaVA models with their own processors, and images whose colours encode coordinates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from llava_mini import LlavaMiniForConditionalGeneration, LlavaMiniProcessor
from llava_mini.visual_layout import VisualLayout
from probes.tokens.places import Places
from tests.tiny_models import sharp_text_config, tiny_llava_config, tiny_vision_config

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "what", "is", "this", "user", "assistant", ":", "<image>", "<video>"]
PIXELS = {"image_size": 24, "patch_size": 6}
PLAIN = {"do_normalize": False, "image_mean": [0.0, 0.0, 0.0]}  # padding is black and colours are unchanged


class OnevisionProcessor(LlavaOnevisionProcessor):
    """Processor without a video processor, which needs torchvision. Tests build the tensors of videos."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)


def text_config(config_class: Any = LlamaConfig) -> Any:
    """Return a tiny configuration of the language model, with a vocabulary of WORDS."""
    return sharp_text_config(config_class, vocab_size=len(WORDS), num_hidden_layers=2, eos_token_id=2)


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )


@pytest.fixture
def make_llava() -> Callable[..., tuple[LlavaForConditionalGeneration, LlavaProcessor]]:
    """Factory of a LLaVA-1.5 with 4 x 4 patches; `fields` configure its image processor."""

    def make(pad: bool = False, strategy: str = "default", **fields: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        config = tiny_llava_config(
            vision_config=tiny_vision_config(**PIXELS),
            text_config=text_config(),
            image_token_id=WORDS.index("<image>"),
            vision_feature_select_strategy=strategy,
        )
        image_processor_class = LlavaImageProcessorPil if pad else CLIPImageProcessorPil
        fields = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}} | PLAIN | fields
        processor = LlavaProcessor(
            image_processor=image_processor_class(**fields, **({"do_pad": True} if pad else {})),
            tokenizer=tokenizer(),
            patch_size=6,
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=1,
        )
        return LlavaForConditionalGeneration(config).eval(), processor

    return make


@pytest.fixture
def make_llava_next() -> Callable[..., tuple[LlavaNextForConditionalGeneration, LlavaNextProcessor]]:
    """Factory of a LLaVA-NeXT with 4 x 4 patches per tile; `fields` configure its image processor."""

    def make(**fields: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        pinpoints = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
        config = tiny_llava_config(
            LlavaNextConfig,
            vision_config=tiny_vision_config(**PIXELS),
            text_config=text_config(),
            image_token_id=WORDS.index("<image>"),
            image_grid_pinpoints=pinpoints,
        )
        fields = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}} | PLAIN | fields
        processor = LlavaNextProcessor(
            image_processor=LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints, **fields),
            tokenizer=tokenizer(),
            patch_size=6,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
        return LlavaNextForConditionalGeneration(config).eval(), processor

    return make


@pytest.fixture
def make_llava_onevision() -> Callable[..., tuple[LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor]]:
    """Factory of a LLaVA-OneVision with 5 x 5 patches per tile. As in SigLIP at 384 pixels, 2 pixels are in no patch."""

    def make(tiles: int = 2) -> tuple[Any, Any]:
        torch.manual_seed(0)
        pinpoints = [[32 * down, 32 * across] for down in (1, 2, 3) for across in (1, 2, 3)]
        config = tiny_llava_config(
            LlavaOnevisionConfig,
            vision_config=tiny_vision_config(SiglipVisionConfig, image_size=32, patch_size=6, vision_use_head=False),
            text_config=text_config(Qwen2Config),
            image_token_id=WORDS.index("<image>"),
            video_token_index=WORDS.index("<video>"),
            image_grid_pinpoints=pinpoints,
            vision_feature_select_strategy="full",
            vision_aspect_ratio=f"anyres_max_{tiles}",
        )
        size = {"height": 32, "width": 32}
        processor = OnevisionProcessor(
            image_processor=LlavaOnevisionImageProcessorPil(image_grid_pinpoints=pinpoints, size=size, **PLAIN),
            tokenizer=tokenizer(),
            num_image_tokens=25,
            vision_feature_select_strategy="full",
            vision_aspect_ratio=f"anyres_max_{tiles}",
        )
        return LlavaOnevisionForConditionalGeneration(config).eval(), processor

    return make


@pytest.fixture
def coordinate_image() -> Callable[[int, int], Image.Image]:
    """Factory of images of a given height and width whose colours encode coordinates."""
    return make_coordinate_image


def make_coordinate_image(height: int, width: int) -> Image.Image:
    """Return an image whose red rises from left to right and green from top to bottom; only padding lacks blue."""
    across = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    down = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width))
    return Image.fromarray(np.rint(255 * np.stack([across, down, np.ones_like(down)], -1)).astype(np.uint8))


class MeanColours(nn.Module):
    """Stand-in vision tower: the feature of a patch is its mean colour; an optional class token precedes them."""

    def __init__(self, patch: int, class_token: bool) -> None:
        super().__init__()
        self.patch, self.class_token = patch, class_token

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        colours = nn.functional.avg_pool2d(pixel_values, self.patch).flatten(2).transpose(1, 2)
        if self.class_token:
            colours = nn.functional.pad(colours, (0, 0, 1, 0), value=float("nan"))
        return SimpleNamespace(hidden_states=(colours,) * 3, last_hidden_state=colours)


@pytest.fixture
def token_colours() -> Callable[..., Tensor]:
    """Function that returns the mean colour of each visual token, through the model's own path from pixels to tokens."""

    def colours(model: Any, inputs: Any, prefused: bool = False) -> Tensor:
        model, nan = model.model, float("nan")
        patch = model.config.vision_config.patch_size
        vision_tower, projector = model.vision_tower, model.multi_modal_projector
        model.vision_tower = MeanColours(patch, class_token=model.config.vision_config.model_type.startswith("clip"))
        model.multi_modal_projector = nn.Identity()
        newline = getattr(model, "image_newline", None)
        if newline is not None:
            model.image_newline = nn.Parameter(torch.full((3,), nan), requires_grad=False)
        try:
            if "visual_layout" in inputs:
                layout = VisualLayout.read(inputs["visual_layout"], inputs["input_ids"][:, 0], inputs["pixel_values"])
                parts = (model.encode(pixels) for _, pixels in layout.chunks(inputs["pixel_values"], 1))
                features = [torch.cat(part, dim=1)[0] if prefused else part[1][0] for part in parts]
            elif "pixel_values_videos" in inputs:
                features = model.get_video_features(inputs["pixel_values_videos"]).pooler_output
                # Older transformers versions append the newline of a video in the model's forward.
                tokens = int((inputs["input_ids"] == model.config.video_token_id).sum())
                if features.shape[0] * features.shape[1] < tokens:
                    features = nn.functional.pad(features, (0, 0, 0, 1), value=nan)
            else:
                image_inputs = {
                    k: inputs[k] for k in ("pixel_values", "image_sizes", "batch_num_images") if k in inputs
                }
                features = model.get_image_features(**image_inputs).pooler_output
        finally:
            model.vision_tower, model.multi_modal_projector = vision_tower, projector
            if newline is not None:
                model.image_newline = newline
        return torch.cat(list(features))

    return colours


@pytest.fixture
def check_boxes() -> Callable[..., None]:
    """Function that checks the colours of visual tokens against their boxes, both in reading order.

    Args of the function:
        colours: Mean colour of each token `[tokens, 3]` of coordinate images; NaN for tokens that cover no part of one.
        places: Coordinates of the tokens; the check reads only visual tokens.
        sizes: (height, width) of the image, one for all tokens or one per token.
        tolerance: Largest error, as a fraction of the image's height and width.
    """

    def check(colours: Tensor, places: Places, sizes: Sequence[Any], tolerance: float = 0.012) -> None:
        visual = places.image >= 0
        box = places.box[visual].double()
        height, width = torch.as_tensor(sizes).double().reshape(-1, 2).T
        assert torch.equal(box.isnan().any(-1), colours.isnan().any(-1)), (
            "boxes are missing for tokens that have colours"
        )
        assert torch.equal(box.isnan().any(-1), places.column[visual] < 0)
        left, top, right, bottom = (box / torch.stack([width, height, width, height], -1)).T
        assert ((right > left) & (bottom > top) | left.isnan()).all()
        inside_x, inside_y = ((b.clamp(max=1) - a.clamp(min=0)).clamp(min=0) for a, b in ((left, right), (top, bottom)))
        share = inside_x * inside_y / ((right - left) * (bottom - top))
        has_colour = ~colours.isnan().any(-1)
        blue = colours[has_colour, 2].double()
        assert (blue - share[has_colour]).abs().max() < 6 * tolerance, (
            "wrong fractions of the boxes lie outside the image"
        )
        mostly_inside = has_colour & (share > 0.15)
        mean = colours[mostly_inside, :2].double() / colours[mostly_inside, 2:]
        middle = torch.stack([left.clamp(min=0) + right.clamp(max=1), top.clamp(min=0) + bottom.clamp(max=1)], -1) / 2
        error = (mean - middle[mostly_inside]).abs().amax(1)
        allowed = torch.where(
            share[mostly_inside] > 0.999, tolerance, 3 * tolerance
        )  # interpolation blurs the edge of padding
        assert (error < allowed).all(), f"boxes are off by up to {float((error / allowed).max() * tolerance):.4f}"

    return check


@pytest.fixture
def make_llava_mini(make_llava: Any) -> Callable[..., tuple[LlavaMiniForConditionalGeneration, LlavaMiniProcessor]]:
    """Factory of a LLaVA-Mini on `make_llava` with C = 2 and two pre-fusion layers; `fields` override its config."""

    def make(tiles: int = 1, pad_to_square: bool = False, **fields: Any) -> tuple[Any, Any]:
        llava, processor = make_llava()
        fields = {"compressor_size": 2, "prefusion_layers": 2, "compressor_heads": 4} | fields
        model = LlavaMiniForConditionalGeneration.from_llava(llava, **fields).eval()
        processor = LlavaMiniProcessor.from_llava(processor, model.config, tiles=tiles, pad_to_square=pad_to_square)
        return model, processor

    return make
