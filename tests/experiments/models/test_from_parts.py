"""A LLaVA from two directories, and with an adapter that was trained in it."""

import pytest
import torch
from transformers import (
    BitImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaForCausalLM,
)

from experiments.config.schema import Config, DataConfig, JoinedModel, TrainConfig
from experiments.evaluation.questions import Questions
from experiments.models import lora, scratch
from experiments.models.build import build_model
from experiments.training.trainer import ADAPTER, train

CPU = torch.device("cpu")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}"
)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}


@pytest.fixture
def parts(llava, few, tmp_path):
    """A vision and a language directory."""
    torch.manual_seed(1)
    Dinov2Model(Dinov2Config(**SMALL)).save_pretrained(tmp_path / "vision")
    crop = {"height": 56, "width": 56}
    BitImageProcessor(size={"shortest_edge": 64}, crop_size=crop).save_pretrained(tmp_path / "vision")
    text = scratch.tokenizer(few.samples, 384)
    text.chat_template = TEMPLATE
    text.save_pretrained(tmp_path / "language")
    decoder = LlamaForCausalLM(llava.config.text_config)
    decoder.save_pretrained(tmp_path / "language")
    return {"vision": str(tmp_path / "vision"), "language": str(tmp_path / "language")}


def joined(parts, **fields):
    return build_model(Config(model=JoinedModel(name="joined", **parts, **fields), data=DataConfig(name="none")), None)


@pytest.mark.parametrize(("grid", "patches", "side"), [(None, 16, 56), (2, 4, 28), (6, 36, 84)])
def test_a_grid_says_how_large_pictures_are(parts, few, grid, patches, side):
    model, processor = joined(parts, grid=grid)
    inputs = Questions([few.samples[0]], processor, 1, CPU).first()
    assert inputs["pixel_values"].shape[2:] == (side, side)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == patches == model.config.image_seq_length
    with torch.inference_mode():
        assert model(**inputs).logits.isfinite().all()


def test_a_tower_of_fixed_positions_refuses_another_grid(parts, few):
    CLIPVisionModel(CLIPVisionConfig(**SMALL, intermediate_size=64)).save_pretrained(parts["vision"])
    model, processor = joined(parts, grid=2)
    with pytest.raises(ValueError, match=r"28\*28.*doesn't match model"):
        model(**Questions([few.samples[0]], processor, 1, CPU).first())


def test_an_adapter_brings_back_what_was_trained(parts, few, tmp_path):
    config = TrainConfig(steps=3, batch_size=4, warmup=0, learning_rate=1e-2, lora=2)
    model, processor = joined(parts)
    inputs = Questions([few.samples[0]], processor, 1, CPU).first()
    with torch.inference_mode():
        before = model(**inputs).logits
    train(model, processor, few.samples, config, tmp_path / "work", 0, CPU)
    again, _ = joined(parts, adapter=str(tmp_path / "work" / ADAPTER))
    with torch.inference_mode():
        trained, loaded = model(**inputs).logits, again(**inputs).logits
    torch.testing.assert_close(loaded, trained, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(trained, before, atol=1e-2)
    assert not any("lora" in name for name, _ in again.named_modules())


def test_wrong_adapters_are_refused_in_one_line(parts, few, llava, processor, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model.adapter: no folder"):
        joined(parts, adapter=str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"'.*empty' holds no adapter_model.safetensors"):
        joined(parts, adapter=str(tmp_path / "empty"))
    adapted = lora.adapt(llava, 2)
    lora.merge(adapted, tmp_path / "other")  # of a model of another width
    with pytest.raises(ValueError, match="not of a model like this one"):
        joined(parts, adapter=str(tmp_path / "other"))
