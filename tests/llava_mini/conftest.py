"""Fixtures: tiny models, and the checkpoint that the official code was run on, rebuilt from its seeded numbers."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Dinov2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from llava_mini import LlavaMiniConfig, LlavaMiniForConditionalGeneration
from tests import tiny_models

IMAGE_TOKEN = 99

VISION = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig, "dinov2": Dinov2Config}
TEXT = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 6}),
    "gemma": (GemmaConfig, {"num_key_value_heads": 1, "head_dim": 6}),
    "gemma2": (Gemma2Config, {"head_dim": 6, "sliding_window": 8}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 6, "sliding_window": 8}),
}
TEXT_SIZES = {"vocab_size": 100, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
VISION_SIZES = {"num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 24, "patch_size": 6}

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }} {% else %}<{{ part.type }}> {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


@pytest.fixture
def tiny_llava():
    """Return a factory of LLaVAs with 16 patches an image, in evaluation mode, with weights that affect the output."""

    def build(text="llama", vision="clip", seed=0, attention="eager") -> LlavaForConditionalGeneration:
        config_class, fields = TEXT[text]
        return tiny_models.tiny_llava(
            attention,
            seed,
            vision_config=tiny_models.tiny_vision_config(VISION[vision], **VISION_SIZES),
            text_config=tiny_models.sharp_text_config(config_class, eos_token_id=2, **TEXT_SIZES, **fields),
            image_token_id=IMAGE_TOKEN,
            vision_feature_select_strategy="full" if vision == "siglip" else "default",
        )

    return build


@pytest.fixture
def tiny_mini(tiny_llava):
    """Return a factory of LLaVA-Minis on `tiny_llava`, by default with C = 2 and two pre-fusion layers."""

    def build(text="llama", vision="clip", seed=0, attention="eager", **fields) -> LlavaMiniForConditionalGeneration:
        fields = {"compressor_size": 2, "prefusion_layers": 2} | fields
        return LlavaMiniForConditionalGeneration.from_llava(tiny_llava(text, vision, seed, attention), **fields)

    return build


@pytest.fixture
def llava_processor():
    """Return a LLaVA processor with a vocabulary of a few words."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "what", "is", "this", "user", "assistant", ":"]
    tokenizer = Tokenizer(
        WordLevel({word: i for i, word in enumerate(words)} | {"<image>": IMAGE_TOKEN}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    size = {"height": 24, "width": 24}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=size),
        tokenizer=fast,
        patch_size=6,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


@pytest.fixture
def bare_tokenizer():
    """Return a factory of tokenizers with exactly these words, split by `pieces`, without a chat template.

    Start and end tokens are Vicuna's if its words are given, else Llama 3's.
    """

    def build(words, pieces) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
        tokenizer.pre_tokenizer = pieces
        bos, eos = ("<s>", "</s>") if "<s>" in words else ("<|begin_of_text|>", "<|eot_id|>")
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)

    return build


@pytest.fixture
def sample():
    """Return a factory of token ids, with one image's placeholders after two text tokens, and of its pixels."""

    def build(num_visual: int, text: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(3, IMAGE_TOKEN, (text,), generator=generator)
        ids = torch.cat([words[:2], torch.full((num_visual,), IMAGE_TOKEN), words[2:]])
        return ids, torch.randn(3, 24, 24, generator=generator)

    return build


@pytest.fixture(scope="session")
def official() -> dict[str, torch.Tensor]:
    """Load the official code's outputs for the weights of `official_model`; see data/README.md."""
    with np.load(Path(__file__).parent / "data" / "official_c1p4.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture(scope="session")
def official_model() -> LlavaMiniForConditionalGeneration:
    """Build a LLaVA-Mini with C = 1, four pre-fusion layers and the seeded numbers of the official checkpoint."""
    config = LlavaMiniConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=16,
            image_size=56,
            patch_size=14,
            hidden_act="quick_gelu",
        ),
        text_config=LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
        ),
        image_token_index=127,
    )
    model = LlavaMiniForConditionalGeneration(config).eval()
    weights = {name: seeded(official_name(name), tuple(w.shape)) for name, w in model.state_dict().items()}
    model.load_state_dict(weights)
    return model


def seeded(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw N(0, 0.05^2) numbers, seeded by the name. One-dimensional weights are centred on 1."""
    numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    numbers = numbers * np.float32(0.05)
    return torch.from_numpy(numbers + np.float32(1) if name.endswith(".weight") and len(shape) == 1 else numbers)


def official_name(name: str) -> str:
    """Return the name of our parameter `name` in the official checkpoint or in its CLIP folder."""
    for ours, official in (
        ("model.vision_tower.", "vision_model."),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("model.prefusion.layers.", "model.prefusion_layers."),
        ("model.language_model.", "model."),
    ):
        if name.startswith(ours):
            return official + name.removeprefix(ours)
    return name


OFFICIAL_CONFIG = {
    "architectures": ["LlavaMiniLlamaForCausalLM"],
    "model_type": "llava_mini_llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "tie_word_embeddings": False,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "use_mm_proj": True,
    "compressor_size": 1,
    "prefusion_layer_num": 4,
    "resolution_ratio": 1,
}


def official_weights(config: LlavaMiniConfig, vision_tower: bool) -> dict[str, torch.Tensor]:
    """Return the seeded numbers of the vision tower, or of all other parts, by official name."""
    with torch.device("meta"):
        model = LlavaMiniForConditionalGeneration(config)
    names = {official_name(name): tuple(weight.shape) for name, weight in model.state_dict().items()}
    return {
        name: seeded(name, shape) for name, shape in names.items() if name.startswith("vision_model.") == vision_tower
    }


@pytest.fixture(scope="session")
def official_clip(official_model, tmp_path_factory) -> Path:
    """Write the folder of the official checkpoint's CLIPVisionModel, with the weight names of CLIP's releases."""
    folder = tmp_path_factory.mktemp("clip")
    save_file(official_weights(official_model.config, vision_tower=True), folder / "model.safetensors")
    official_model.config.vision_config.save_pretrained(folder)
    crop = {"height": 56, "width": 56}
    CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=crop, image_mean=[0.1] * 3).save_pretrained(folder)
    return folder


@pytest.fixture
def official_checkpoint(official_model, official_clip, tmp_path):
    """Return a factory of folders in the official layout, with the seeded numbers.

    Args of the factory:
        suffix: "safetensors" or "bin".
        shards: Number of weight files; several have an index.
        edit: Function applied to the weights before they are written.
        fields: Fields of config.json; None removes a field.
    """

    def write(suffix="safetensors", shards=1, edit=lambda weights: weights, **fields) -> Path:
        values = OFFICIAL_CONFIG | {"mm_vision_tower": str(official_clip)} | fields
        ours = official_model.config.to_dict()
        ours |= {"compressor_size": values["compressor_size"] or 1}
        ours |= {"prefusion_layers": 4 if values["prefusion_layer_num"] is None else values["prefusion_layer_num"]}
        weights = edit(official_weights(LlavaMiniConfig(**ours), vision_tower=False))
        folder = tmp_path / "official"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
        whole = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[suffix]
        stem, index = whole.split(".")[0], {}
        for i in range(shards):
            file = whole if shards == 1 else f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}"
            part = dict(list(weights.items())[i::shards])
            index |= dict.fromkeys(part, file)
            (save_file if suffix == "safetensors" else torch.save)(part, folder / file)
        if shards > 1:
            (folder / f"{whole}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        return folder

    return write
