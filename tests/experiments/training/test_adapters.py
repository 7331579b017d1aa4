"""Training of LoRA adapters, from new ones and from saved ones."""

import dataclasses

import pytest
import torch
from safetensors import safe_open

from experiments.config.schema import TrainConfig
from experiments.models import lora
from experiments.training.trainer import train_llava
from llava_mini import LlavaMiniForConditionalGeneration
from tests.experiments.training.weights import changed_parameters, copy_weights

CPU = torch.device("cpu")
ONE_STEP = TrainConfig(max_steps=1, batch_size=2, warmup_steps=0, lr_scheduler_type="constant", weight_decay=0)


def test_train_llava_with_lora_updates_low_rank_and_saves_the_adapter(mini, mini_processor, shapes_split, tmp_path):
    """Linear layers of the language model get an update of the given rank, and new modules are trained in full.

    The saved adapter turns the initial model into the trained one.
    """
    from peft import PeftModel

    before = copy_weights(mini)
    config = dataclasses.replace(ONE_STEP, max_steps=3, lora_rank=2, learning_rate=1e-2)
    train_llava(mini, mini_processor, shapes_split.samples, config, tmp_path, 0, CPU)
    new_modules = ("multi_modal_projector", "compressor", "prefusion")
    linear_weights = {
        n for n, p in mini.named_parameters() if "language_model.layers" in n and n.endswith("_proj.weight")
    }
    assert len(linear_weights) == 2 * 7
    assert changed_parameters(mini, before) == linear_weights | {
        n for n, _ in mini.named_parameters() if any(part in n for part in new_modules)
    }
    for name in linear_weights:
        assert torch.linalg.matrix_rank(mini.get_parameter(name) - before[name], rtol=1e-3) == 2
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert sum(file.get_tensor(key).numel() for key in file.keys()) < sum(p.numel() for p in mini.parameters()) / 2  # noqa: SIM118

    after = copy_weights(mini)
    mini.load_state_dict(before)
    restored = PeftModel.from_pretrained(mini, tmp_path / "adapter").merge_and_unload()
    assert all(torch.equal(after[name], value) for name, value in restored.state_dict().items())


def test_train_llava_with_lora_without_peft_raises(llava, processor, shapes_split, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "is_peft_available", lambda: False)
    with pytest.raises(ImportError, match=r"train.lora_rank needs peft: pip install peft"):
        train_llava(
            llava, processor, shapes_split.samples, dataclasses.replace(ONE_STEP, lora_rank=2), tmp_path, 0, CPU
        )


def test_train_llava_starts_from_a_saved_adapter(mini, mini_processor, shapes_split, tmp_path):
    """Training that learns nothing more merges the saved adapter into another copy of the initial model."""
    start = copy_weights(mini)
    config = dataclasses.replace(ONE_STEP, max_steps=3, lora_rank=2, learning_rate=1e-2)
    train_llava(mini, mini_processor, shapes_split.samples, config, tmp_path / "first", 0, CPU)
    trained = copy_weights(mini)
    mini.load_state_dict(start)
    again = dataclasses.replace(config, learning_rate=1e-30, lora_init=str(tmp_path / "first" / "adapter"))
    train_llava(mini, mini_processor, shapes_split.samples, again, tmp_path / "second", 0, CPU)
    for name, weight in copy_weights(mini).items():
        torch.testing.assert_close(weight, trained[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(("rank", "prefusion_layers"), [(3, 1), (2, 0), (2, 2)])
def test_train_llava_from_an_adapter_of_another_model_raises(
    llava, mini, mini_processor, shapes_split, tmp_path, rank, prefusion_layers
):
    config = dataclasses.replace(ONE_STEP, lora_rank=2)
    train_llava(mini, mini_processor, shapes_split.samples, config, tmp_path / "first", 0, CPU)
    other = LlavaMiniForConditionalGeneration.from_llava(llava, compressor_size=2, prefusion_layers=prefusion_layers)
    adapter = tmp_path / "first" / "adapter"
    config = dataclasses.replace(config, lora_rank=rank, lora_init=str(adapter))
    with pytest.raises(ValueError, match=rf"train\.lora_init: '{adapter}'"):
        train_llava(other, mini_processor, shapes_split.samples, config, tmp_path / "second", 0, CPU)


def test_train_llava_from_a_folder_without_adapter_raises(mini, mini_processor, shapes_split, tmp_path):
    config = dataclasses.replace(ONE_STEP, lora_rank=2, lora_init=str(tmp_path))
    with pytest.raises(ValueError, match=rf"train\.lora_init: '{tmp_path}' .*safetensors"):
        train_llava(mini, mini_processor, shapes_split.samples, config, tmp_path / "work", 0, CPU)
