"""Building, saving and loading of models: which weights come from which source."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText, BitsAndBytesConfig

from llava_mini import LlavaMiniConfig, LlavaMiniForConditionalGeneration, LlavaMiniModel
from tests.tiny_models import tiny_llava_config, tiny_text_config, tiny_vision_config

NEW_MODULES = ("model.compressor.", "model.prefusion.")


def have_equal_tensors(actual: dict, expected: dict) -> bool:
    return actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in expected)


def select_llava_weights(model) -> dict:
    """Return the weights that the model shares with LLaVA."""
    return {key: weight for key, weight in model.state_dict().items() if not key.startswith(NEW_MODULES)}


@pytest.mark.parametrize("text", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "fields", [{}, {"compressor": "none"}, {"compressor": "average", "prefusion_init": "language_model"}]
)
def test_from_pretrained_of_a_saved_model_is_bitwise_equal(tiny_mini, sample, tmp_path, text, fields):
    model = tiny_mini(text, **fields)
    with torch.no_grad():
        for parameter in model.parameters():  # no weight then equals its initial value
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(loaded) is LlavaMiniForConditionalGeneration
    assert have_equal_tensors(loaded.state_dict(), model.state_dict())
    ids, pixels = sample(model.config.num_visual_tokens(16), 5)
    with torch.no_grad():
        logits = [m(input_ids=ids[None], pixel_values=pixels[None]).logits for m in (loaded, model)]
    assert torch.equal(*logits)


def test_auto_model_of_a_full_checkpoint_loads_the_base_model(tiny_mini, tmp_path):
    model = tiny_mini()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is LlavaMiniModel
    assert have_equal_tensors(loaded.state_dict(), model.model.state_dict())


def test_from_llava_copies_weights_dtype_and_attention(tiny_llava):
    llava = tiny_llava().to(torch.bfloat16)
    llava.model.language_model.set_attn_implementation("sdpa")
    mini = LlavaMiniForConditionalGeneration.from_llava(llava)
    assert mini.dtype == torch.bfloat16
    assert not mini.training
    assert mini.model.language_model.config._attn_implementation == "sdpa"
    assert mini.model.vision_tower.config._attn_implementation == "eager"
    assert have_equal_tensors(select_llava_weights(mini), llava.state_dict())
    before = {key: weight.clone() for key, weight in llava.state_dict().items()}
    with torch.no_grad():
        for parameter in mini.parameters():
            parameter.zero_()
    assert have_equal_tensors(llava.state_dict(), before)
    assert llava.config.model_type == "llava"


def test_from_llava_with_tied_embeddings_ties_them(tiny_llava):
    llava = tiny_llava()
    llava.config.tie_word_embeddings = llava.config.text_config.tie_word_embeddings = True
    llava.tie_weights()
    mini = LlavaMiniForConditionalGeneration.from_llava(llava)
    assert mini.lm_head.weight is mini.get_input_embeddings().weight
    assert torch.equal(mini.lm_head.weight, llava.lm_head.weight)


def test_from_llava_with_a_seed_draws_the_same_new_modules(tiny_llava):
    llava, states = tiny_llava(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(LlavaMiniForConditionalGeneration.from_llava(llava).state_dict())
    assert have_equal_tensors(states[0], states[1])
    assert not torch.equal(states[0]["model.compressor.query"], states[2]["model.compressor.query"])
    name = "model.prefusion.layers.0.mlp.up_proj.weight"
    assert not torch.equal(states[0][name], states[2][name])
    assert abs(states[0][name].std() - 0.2) < 0.03  # the language model's initializer_range


def save_llava_checkpoint(llava, folder, without=()):
    """Save a LLaVA with the weight names that released checkpoints have on disk."""
    llava.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    assert "language_model.model.embed_tokens.weight" in weights
    save_file({k: w for k, w in weights.items() if k not in without}, folder / "model.safetensors", {"format": "pt"})


def test_from_pretrained_of_a_llava_checkpoint_keeps_its_weights(tiny_llava, tmp_path):
    llava = tiny_llava()
    save_llava_checkpoint(llava, tmp_path)
    mini, info = LlavaMiniForConditionalGeneration.from_pretrained(
        tmp_path, compressor_size=2, prefusion_layers=1, output_loading_info=True
    )
    assert have_equal_tensors(select_llava_weights(mini), llava.state_dict())
    assert info["missing_keys"]
    assert all(key.startswith(NEW_MODULES) for key in info["missing_keys"])
    assert mini.model.compressor.query.shape == (4, 32)
    assert torch.isfinite(torch.cat([p.flatten() for p in mini.parameters()])).all()


def test_base_model_from_pretrained_of_a_llava_checkpoint_keeps_its_weights(tiny_llava, tmp_path):
    llava = tiny_llava()
    save_llava_checkpoint(llava, tmp_path)
    loaded = LlavaMiniModel.from_pretrained(tmp_path, compressor="none", prefusion_layers=0)
    assert have_equal_tensors(loaded.state_dict(), llava.model.state_dict())


def test_save_pretrained_after_a_llava_checkpoint_loads_as_llava_mini(tiny_llava, tmp_path):
    save_llava_checkpoint(tiny_llava(), tmp_path / "llava")
    mini = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "llava")
    mini.save_pretrained(tmp_path / "mini")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "mini")
    assert type(loaded) is LlavaMiniForConditionalGeneration
    assert have_equal_tensors(loaded.state_dict(), mini.state_dict())
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("mini", "llava"))
    assert {key for key in ours if not key.startswith(NEW_MODULES)} == theirs.keys()  # the names of LLaVA on disk


def test_from_pretrained_of_an_incomplete_llava_checkpoint_raises(tiny_llava, tmp_path):
    save_llava_checkpoint(tiny_llava(), tmp_path, ["language_model.model.norm.weight", "language_model.lm_head.weight"])
    with pytest.raises(ValueError, match=r"lacks 2 weights .*lm_head\.weight"):
        LlavaMiniForConditionalGeneration.from_pretrained(tmp_path)


def test_from_pretrained_with_a_wrong_field_raises(tiny_llava, tmp_path):
    save_llava_checkpoint(tiny_llava(), tmp_path)
    with pytest.raises(ValueError, match=r"compressor_size .*at least 0.*-1"):
        LlavaMiniForConditionalGeneration.from_pretrained(tmp_path, compressor_size=-1)


@pytest.mark.parametrize("text", ["llama", "qwen2", "gemma3"])
def test_prefusion_with_identity_init_equals_no_prefusion_and_learns(tiny_llava, sample, text):
    """The logits equal those without pre-fusion, and the zeroed output projections have gradients."""
    fields = {"compressor": "average", "compressor_size": 2}
    llava = tiny_llava(text)
    plain, identity = (
        LlavaMiniForConditionalGeneration.from_llava(llava, **fields, prefusion_layers=n, prefusion_init="identity")
        for n in (0, 2)
    )
    ids, pixels = sample(4, 5)
    labels = ids.clone()
    labels[:-2] = -100  # the text ahead of the answer is fused
    batch = {"input_ids": ids[None], "pixel_values": pixels[None], "labels": labels[None]}
    actual, expected = identity(**batch), plain(**batch)
    assert torch.equal(actual.logits, expected.logits)
    actual.loss.backward()
    decoder_layers = identity.model.language_model.layers
    for layer, source in zip(identity.model.prefusion.layers, decoder_layers, strict=False):
        assert torch.equal(layer.mlp.up_proj.weight, source.mlp.up_proj.weight)
        assert layer.mlp.down_proj.weight.grad.abs().max() > 0
        assert layer.self_attn.o_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("route", ["from_llava", "from_pretrained", "configuration"])
def test_prefusion_with_language_model_init_copies_its_layers(tiny_llava, tmp_path, route):
    llava, fields = tiny_llava(), {"prefusion_layers": 2, "prefusion_init": "language_model"}
    if route == "from_llava":
        mini = LlavaMiniForConditionalGeneration.from_llava(llava, **fields)
    elif route == "from_pretrained":
        save_llava_checkpoint(llava, tmp_path)
        mini = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path, **fields)
    else:
        config = LlavaMiniForConditionalGeneration.from_llava(llava, **fields).config
        mini = LlavaMiniForConditionalGeneration(config)
    layers = mini.model.language_model.layers
    assert have_equal_tensors(mini.model.prefusion.layers.state_dict(), layers.state_dict())
    assert mini.model.prefusion.layers[0].mlp.up_proj.weight is not layers[0].mlp.up_proj.weight


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
def test_from_pretrained_quantised_keeps_new_modules_unquantised(sample, tmp_path, bits):
    """bitsandbytes on a CPU quantises the language model and the vision tower, not the new modules and the projector."""
    fields = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    vision = tiny_vision_config(**fields, image_size=24, patch_size=6)
    text = tiny_text_config(**fields, vocab_size=100, num_hidden_layers=2, num_key_value_heads=4)
    config = tiny_llava_config(LlavaMiniConfig, vision_config=vision, text_config=text, image_token_id=99)
    LlavaMiniForConditionalGeneration(config).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    model = LlavaMiniForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=quantization, device_map="cpu", dtype=torch.bfloat16
    )
    assert quantization.llm_int8_skip_modules is None
    from_dictionary = LlavaMiniForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config={f"load_in_{bits}bit": True}, device_map="cpu", dtype=torch.bfloat16
    )
    assert {n: p.dtype for n, p in from_dictionary.named_parameters()} == {
        n: p.dtype for n, p in model.named_parameters()
    }
    quantised = {name.split(".")[1] for name, p in model.named_parameters() if not p.is_floating_point()}
    assert quantised == {"language_model", "vision_tower"}
    ids, pixels = sample(1, 5)
    assert model(input_ids=ids[None], pixel_values=pixels[None].to(torch.bfloat16)).logits.isfinite().all()


@torch.no_grad()
def test_from_pretrained_with_offloading_has_the_same_logits(tiny_mini, sample, tmp_path):
    """accelerate loads a module's weights when it is called, so the model must call every module."""
    model = tiny_mini()
    model.save_pretrained(tmp_path / "model")
    ids, pixels = sample(4, 5)
    expected = model(input_ids=ids[None], pixel_values=pixels[None]).logits
    parts = ("vision_tower", "multi_modal_projector", "language_model", "compressor", "prefusion")
    device_map = {f"model.{part}": "disk" for part in parts} | {"lm_head": "cpu"}
    offloaded = LlavaMiniForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "disk", attn_implementation="eager"
    )
    assert offloaded.model.compressor.query.device.type == "meta"
    torch.testing.assert_close(offloaded(input_ids=ids[None], pixel_values=pixels[None]).logits, expected)


def test_from_llava_of_a_llava_without_plain_weights_names_the_reason(tiny_llava):
    llava = tiny_llava()
    llava.model.language_model.layers[0].mlp.up_proj.to("meta")
    with pytest.raises(ValueError, match="offloaded"):
        LlavaMiniForConditionalGeneration.from_llava(llava)
    quantised = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    llava.model.language_model.layers[0].mlp.up_proj.weight = quantised
    with pytest.raises(ValueError, match="quantised"):
        LlavaMiniForConditionalGeneration.from_llava(llava)
    adapted = tiny_llava()
    adapted.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapters"):
        LlavaMiniForConditionalGeneration.from_llava(adapted)


def test_from_llava_keeps_the_name_of_the_llava(tiny_llava):
    llava = tiny_llava()
    llava.name_or_path = "some/llava"
    mini = LlavaMiniForConditionalGeneration.from_llava(llava)
    assert mini.name_or_path == mini.config.name_or_path == "some/llava"
