"""Conversion of official checkpoints: weights, parameter counts, configuration, tokenizer and processor."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from llava_mini import LlavaMiniForConditionalGeneration, LlavaMiniModel, LlavaMiniProcessor, checkpoint
from llava_mini.chat_templates import LLAMA_3_TEMPLATE, VICUNA_TEMPLATE
from llava_mini.convert import check_official, convert_official
from tests.llava_mini.checkpoint_edits import without

LLAMA_3_1_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
VICUNA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rope_theta": None,
}

# Weights


@pytest.mark.parametrize(("suffix", "shards"), [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 2)])
def test_convert_official_keeps_every_tensor(official_checkpoint, official_model, tmp_path, suffix, shards):
    convert_official(official_checkpoint(suffix, shards), tmp_path / "ours")
    model, info = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = official_model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_convert_official_writes_the_names_of_save_pretrained(official_checkpoint, official_model, tmp_path):
    convert_official(official_checkpoint(), tmp_path / "ours")
    official_model.save_pretrained(tmp_path / "saved")
    names = []
    for folder in ("ours", "saved"):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            names.append((sorted(file.keys()), file.metadata()))
    assert names[0] == names[1]


def test_convert_official_reproduces_the_official_logits(official_checkpoint, official, tmp_path):
    convert_official(official_checkpoint(), tmp_path / "ours")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert model.config.image_token_id == 128  # one more than the last row of the embeddings
    ids = official["input_ids"].masked_fill(official["input_ids"] == -200, 128)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=official["pixels_image"].squeeze(1)).logits
    torch.testing.assert_close(logits, official["image.logits_infer"], atol=1e-4, rtol=0)


def test_convert_official_of_other_sizes_loads(official_checkpoint, tmp_path):
    counts = convert_official(official_checkpoint(compressor_size=2, prefusion_layer_num=2), tmp_path / "ours")
    model = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert model.model.compressor.query.shape == (4, 1024)
    assert len(model.model.prefusion.layers) == 2
    assert sum(counts.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert type(LlavaMiniModel.from_pretrained(tmp_path / "ours")) is LlavaMiniModel


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_convert_official_keeps_the_dtype(official_checkpoint, official_clip, tmp_path, dtype):
    src = official_checkpoint(edit=lambda weights: {name: weight.to(dtype) for name, weight in weights.items()})
    convert_official(src, tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    vision_tower = {name: weight for name, weight in ours.items() if name.startswith("vision_tower.")}
    assert {weight.dtype for weight in vision_tower.values()} == {torch.float32}  # the dtype in its own folder
    assert {weight.dtype for name, weight in ours.items() if name not in vision_tower} == {dtype}
    assert LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "ours").dtype == dtype


def test_convert_official_holds_one_bounded_shard_in_memory(official_checkpoint, official_model, tmp_path, monkeypatch):
    limit, shard_bytes = 5 * 2**20, []
    save = checkpoint.save_file

    def save_and_record(tensors, *args, **kwargs):
        shard_bytes.append(sum(tensor.nbytes for tensor in tensors.values()))
        save(tensors, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", limit)
    monkeypatch.setattr(checkpoint, "save_file", save_and_record)
    convert_official(official_checkpoint("bin", 2), tmp_path / "ours")
    largest = max(weight.nbytes for weight in official_model.state_dict().values())
    assert max(shard_bytes) <= max(limit, largest)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path).keys() for path in (tmp_path / "ours").glob("model-*.safetensors")}
    assert len(shards) == len(shard_bytes) > 5
    assert index["weight_map"] == {name: shard for shard, names in shards.items() for name in names}
    assert index["metadata"]["total_size"] == sum(shard_bytes)
    loaded = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in official_model.state_dict().items())


def test_convert_official_with_tied_embeddings_needs_no_head(official_checkpoint, tmp_path):
    src = official_checkpoint(edit=without("lm_head.weight"), tie_word_embeddings=True)
    counts = convert_official(src, tmp_path / "ours")
    model = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert counts["language model"] == sum(p.numel() for p in model.model.language_model.parameters())


# Source of the vision tower


def embed_vision_tower(clip):
    """Return an edit that adds the vision tower to the checkpoint's weights, each number plus one."""
    vision_tower = load_file(clip / "model.safetensors")
    return lambda weights: weights | {f"model.vision_tower.vision_tower.{k}": w + 1 for k, w in vision_tower.items()}


def read_vision_norm(folder):
    return load_file(folder / "model.safetensors")["vision_tower.pre_layrnorm.weight"]


def test_convert_official_prefers_the_vision_folder_to_weights_in_the_checkpoint(
    official_checkpoint, official_clip, tmp_path
):
    def edit(weights):
        return embed_vision_tower(official_clip)(weights) | {"model.vision_tower.unused": torch.ones(1)}

    convert_official(official_checkpoint(edit=edit), tmp_path / "ours")
    own = load_file(official_clip / "model.safetensors")["vision_model.pre_layrnorm.weight"]
    assert torch.equal(read_vision_norm(tmp_path / "ours"), own)


def test_convert_official_without_weights_in_the_vision_folder_uses_the_checkpoint(
    official_checkpoint, official_clip, tmp_path
):
    config_folder = tmp_path / "bare"  # holds a configuration, but no weights
    config_folder.mkdir()
    shutil.copy(official_clip / "config.json", config_folder)
    convert_official(
        official_checkpoint(edit=embed_vision_tower(official_clip)), tmp_path / "ours", vision_tower=config_folder
    )
    own = load_file(official_clip / "model.safetensors")["vision_model.pre_layrnorm.weight"]
    assert torch.equal(read_vision_norm(tmp_path / "ours"), own + 1)


@pytest.mark.parametrize("form", ["whole CLIP", "saved by transformers", "relative to the checkpoint"])
def test_convert_official_reads_every_form_of_vision_folder(official_checkpoint, official_clip, tmp_path, form):
    src = official_checkpoint(mm_vision_tower="tower")
    weights = load_file(official_clip / "model.safetensors")
    own = weights["vision_model.pre_layrnorm.weight"]
    vision_folder = src / "tower" if form == "relative to the checkpoint" else tmp_path / "elsewhere"
    shutil.copytree(official_clip, vision_folder)
    weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    if form == "whole CLIP":
        weights |= {"text_model.final_layer_norm.weight": torch.ones(4), "logit_scale": torch.ones(())}
        config = {"model_type": "clip", "vision_config": json.loads((vision_folder / "config.json").read_text())}
        (vision_folder / "config.json").write_text(json.dumps(config))
    elif form == "saved by transformers":
        weights = {name.removeprefix("vision_model."): weight for name, weight in weights.items()}
    save_file(weights, vision_folder / "model.safetensors")
    convert_official(src, tmp_path / "ours", None if form == "relative to the checkpoint" else vision_folder)
    assert torch.equal(read_vision_norm(tmp_path / "ours"), own)


def test_convert_official_without_a_vision_tower_names_three_ways_to_give_it(official_checkpoint, tmp_path):
    src = official_checkpoint(mm_vision_tower="openai/clip-vit-large-patch14-336")
    with pytest.raises(
        FileNotFoundError, match=r"--vision-tower.*mm_vision_tower.*clip-vit-large-patch14-336.*model\.vision_tower\.\*"
    ):
        convert_official(src, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


# Counts, computed from the modules of the official code


@pytest.mark.parametrize(
    ("fields", "layer", "without_vision_tower"),
    [(LLAMA_3_1_8B, 218_112_000, 8_927_893_504), (VICUNA_7B, 202_383_360, 7_573_133_312)],
)
def test_check_official_counts_the_parameters_of_the_released_sizes(tmp_path, fields, layer, without_vision_tower):
    official = {
        "model_type": "llava_mini_llama",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "compressor_size": 1,
    }  # prefusion_layer_num defaults to 4
    (tmp_path / "config.json").write_text(json.dumps(official | {k: v for k, v in fields.items() if v is not None}))
    counts = check_official(tmp_path)
    assert counts["pre-fusion"] == 4 * layer
    assert counts["projector"] == 20_979_712
    assert counts["compressor"] == 4_204_544
    assert counts["vision tower"] == 303_507_456
    assert sum(counts.values()) - counts["vision tower"] == without_vision_tower


def test_check_official_counts_the_compressor_of_the_high_resolution_model(official_checkpoint):
    assert check_official(official_checkpoint(compressor_size=8))["compressor"] == 4_333_568


# Configuration


def test_convert_official_reads_rope_scaling_by_its_former_name(official_checkpoint, tmp_path):
    rope_scaling = LLAMA_3_1_8B["rope_scaling"] | {"original_max_position_embeddings": 1024}
    convert_official(official_checkpoint(rope_scaling=rope_scaling), tmp_path / "ours")
    text = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours").config.text_config
    assert text.rope_parameters == rope_scaling | {"rope_theta": 500000.0}


def test_convert_official_copies_or_writes_the_generation_config(official_checkpoint, tmp_path):
    src = official_checkpoint(eos_token_id=[2, 5])
    convert_official(src, tmp_path / "made")
    assert GenerationConfig.from_pretrained(tmp_path / "made").eos_token_id == [2, 5]
    GenerationConfig(eos_token_id=7, do_sample=True, temperature=0.5).save_pretrained(src)
    convert_official(src, tmp_path / "copied")
    names = [folder / "generation_config.json" for folder in (src, tmp_path / "copied")]
    assert names[0].read_text() == names[1].read_text()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llava_llama"}, "model_type is 'llava_llama'"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"compressor_size": None}, "has no compressor_size"),
        ({"mm_vision_select_layer": None}, "has no mm_vision_select_layer"),
        ({"compressor_size": "one"}, "compressor_size.*one"),
    ],
)
def test_check_official_with_an_unsupported_config_raises_one_line(official_checkpoint, fields, message):
    src = official_checkpoint()
    config = json.loads((src / "config.json").read_text()) | fields
    (src / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(ValueError, match=message) as caught:
        check_official(src)
    assert "\n" not in str(caught.value)


# Tokenizer and processor

LLAMA_3_WORDS = [
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
]
VICUNA_WORDS = ["<unk>", "<s>", "</s>"]


@pytest.mark.parametrize(("special", "llama_3"), [(LLAMA_3_WORDS, True), (VICUNA_WORDS, False)])
def test_convert_official_adds_the_image_token_after_the_vocabulary(
    official_checkpoint, bare_tokenizer, tmp_path, special, llama_3
):
    src = official_checkpoint(compressor_size=2, image_aspect_ratio="pad", resolution_ratio=2)
    words = ["!", *special, "What", "is", "this?"]
    bare_tokenizer(words, WhitespaceSplit()).save_pretrained(src)
    convert_official(src, tmp_path / "ours")
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    config = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours").config
    assert type(processor) is LlavaMiniProcessor
    assert processor.tokenizer.get_vocab() == {word: i for i, word in enumerate([*words, "<image>"])}
    assert config.image_token_id == processor.image_token_id == len(words)
    assert processor.tokenizer.pad_token == ("<|finetune_right_pad_id|>" if llama_3 else None)
    assert (processor.num_visual_tokens, processor.patch_size, processor.num_additional_image_tokens) == (4, 14, 1)
    assert (processor.tiles, processor.pad_to_square) == (2, True)
    assert list(processor.image_processor.image_mean) == [0.1] * 3  # from the vision tower's folder
    assert processor.chat_template == processor.tokenizer.chat_template
    assert processor.chat_template == (LLAMA_3_TEMPLATE if llama_3 else VICUNA_TEMPLATE)
    batch = processor(images=Image.new("RGB", (20, 30)), text="What is <image>", return_tensors="pt")
    assert batch["input_ids"].tolist() == [[words.index("What"), words.index("is"), *[len(words)] * 4]]


def test_convert_official_without_a_tokenizer_writes_no_processor(official_checkpoint, tmp_path, caplog):
    with caplog.at_level("INFO"):
        convert_official(official_checkpoint(), tmp_path / "ours")
    assert "has no tokenizer" in caplog.text
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
