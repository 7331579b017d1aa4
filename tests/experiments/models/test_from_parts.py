"""A LLaVA from a vision and a language model, and with an adapter that was trained in it."""

import pytest
import torch
from transformers import (
    BitImageProcessor,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaForCausalLM,
)

from experiments.config.data_schema import DataConfig
from experiments.config.schema import Config, JoinedModel, TrainConfig
from experiments.evaluation.questions import EncodedQuestions
from experiments.models import lora, scratch
from experiments.models.build import build_model
from experiments.training.trainer import ADAPTER_FOLDER, train_llava
from tests.tiny_models import tiny_vision_config

CPU = torch.device("cpu")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}"
)
PIXELS = {"image_size": 56, "patch_size": 14}


@pytest.fixture
def parts(llava, shapes_split, tmp_path):
    """Folders of a vision model and of a language model."""
    torch.manual_seed(1)
    Dinov2Model(tiny_vision_config(Dinov2Config, **PIXELS)).save_pretrained(tmp_path / "vision")
    crop = {"height": 56, "width": 56}
    BitImageProcessor(size={"shortest_edge": 64}, crop_size=crop).save_pretrained(tmp_path / "vision")
    text = scratch.train_tokenizer(shapes_split.samples, 384)
    text.chat_template = TEMPLATE
    text.save_pretrained(tmp_path / "language")
    decoder = LlamaForCausalLM(llava.config.text_config)
    decoder.save_pretrained(tmp_path / "language")
    return {"vision": str(tmp_path / "vision"), "language": str(tmp_path / "language")}


def build_joined(parts, **fields):
    return build_model(Config(model=JoinedModel(name="joined", **parts, **fields), data=DataConfig(name="none")), None)


@pytest.mark.parametrize(("grid", "patches", "side"), [(None, 16, 56), (2, 4, 28), (6, 36, 84)])
def test_build_model_with_a_grid_resizes_images_to_it(parts, shapes_split, grid, patches, side):
    model, processor = build_joined(parts, grid=grid)
    inputs = EncodedQuestions([shapes_split.samples[0]], processor, 1, CPU).first()
    assert inputs["pixel_values"].shape[2:] == (side, side)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == patches == model.config.image_seq_length
    with torch.inference_mode():
        assert model(**inputs).logits.isfinite().all()


def test_build_model_with_another_grid_needs_interpolated_positions(parts, shapes_split):
    CLIPVisionModel(tiny_vision_config(intermediate_size=64, **PIXELS)).save_pretrained(parts["vision"])
    model, processor = build_joined(parts, grid=2)
    with pytest.raises(ValueError, match=r"28\*28.*doesn't match model"):
        model(**EncodedQuestions([shapes_split.samples[0]], processor, 1, CPU).first())


def test_build_model_with_an_adapter_equals_the_trained_model(parts, shapes_split, tmp_path):
    config = TrainConfig(max_steps=3, batch_size=4, warmup_steps=0, learning_rate=1e-2, lora_rank=2)
    model, processor = build_joined(parts)
    inputs = EncodedQuestions([shapes_split.samples[0]], processor, 1, CPU).first()
    with torch.inference_mode():
        before = model(**inputs).logits
    train_llava(model, processor, shapes_split.samples, config, tmp_path / "work", 0, CPU)
    restored, _ = build_joined(parts, adapter=str(tmp_path / "work" / ADAPTER_FOLDER))
    with torch.inference_mode():
        trained, loaded = model(**inputs).logits, restored(**inputs).logits
    torch.testing.assert_close(loaded, trained, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(trained, before, atol=1e-2)
    assert not any("lora" in name for name, _ in restored.named_modules())


def test_build_model_with_a_wrong_adapter_raises(parts, shapes_split, llava, processor, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.adapter: no folder '.*none'"):
        build_joined(parts, adapter=str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"model\.adapter: '.*empty' .*adapter_model\.safetensors"):
        build_joined(parts, adapter=str(tmp_path / "empty"))
    adapted = lora.add_adapters(llava, 2)
    lora.save_and_merge_adapter(adapted, tmp_path / "other")  # of a model of another width
    with pytest.raises(ValueError, match=r"model\.adapter: '.*other' does not fit"):
        build_joined(parts, adapter=str(tmp_path / "other"))
