"""Training of models in bfloat16, compared with the same training of the same weights in float32."""

import copy

import pytest
import torch

from experiments.config.schema import TrainConfig
from experiments.training.trainer import train_llava
from llava_mini import LlavaMiniProcessor

CPU = torch.device("cpu")
RATE, STEPS = 2e-5, 40
TRAINING = {"batch_size": 4, "warmup_steps": 0, "lr_scheduler_type": "constant", "weight_decay": 0, "save_steps": 20}


@pytest.fixture
def mini(mini):
    """The LLaVA-Mini in bfloat16."""
    return mini.bfloat16()


def train(model, processor, samples, folder, **settings):
    """Train a model in bfloat16 autocast, and return it."""
    config = TrainConfig(**{"max_steps": STEPS, "learning_rate": RATE, "bf16": True} | TRAINING | settings)
    processor = LlavaMiniProcessor.from_llava(processor, model.config)
    train_llava(model, processor, samples, config, folder, 0, CPU)
    return model


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_training_in_bfloat16_keeps_updates_below_its_precision(mini, processor, shapes_split, tmp_path, lora_rank):
    """A step of 2e-5 changes no bfloat16 weight above 0.01; forty of them change it by up to 8e-4."""
    in_float32 = copy.deepcopy(mini).float()
    start = {name: weight.clone() for name, weight in in_float32.state_dict().items()}
    train(mini, processor, shapes_split.samples, tmp_path / "bf16", lora_rank=lora_rank)
    train(in_float32, processor, shapes_split.samples, tmp_path / "float32", lora_rank=lora_rank)
    assert {weight.dtype for weight in mini.state_dict().values()} == {torch.bfloat16}
    trained, compared = mini.state_dict(), 0
    for name, weight in in_float32.state_dict().items():
        between = (start[name].abs() > 0.01) & (start[name].abs() < 0.1)  # the rounding at the end loses those above
        expected = (weight - start[name])[between].abs()
        if lora_rank and "language_model" in name:
            continue  # the adapters' updates are larger, and are rounded once, as they are merged
        if between.sum() > 100 and expected.any():
            changes = (trained[name].float() - start[name])[between].abs()
            assert changes.mean().item() == pytest.approx(expected.mean().item(), rel=0.3), name
            compared += 1
    assert compared > 5


def test_training_in_bfloat16_resumes_with_the_weights_it_stopped_with(mini, processor, shapes_split, tmp_path):
    whole = train(copy.deepcopy(mini), processor, shapes_split.samples, tmp_path / "whole")
    train(copy.deepcopy(mini), processor, shapes_split.samples, tmp_path / "part", max_steps=20)
    resumed = train(copy.deepcopy(mini), processor, shapes_split.samples, tmp_path / "part")
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, rtol=0, atol=0, msg=name)
