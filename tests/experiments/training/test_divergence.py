"""A training that diverges ends at once, with the setting to lower."""

import dataclasses
import math

import pytest
import torch

from experiments.config.schema import TrainConfig
from experiments.training.trainer import train_llava

CPU = torch.device("cpu")
DIVERGING = TrainConfig(max_steps=8, batch_size=2, warmup_steps=0, learning_rate=1e30, save_steps=2)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0], ids=["clipped", "not clipped"])
def test_train_llava_that_diverges_stops_at_the_next_logged_step(
    mini, mini_processor, shapes_split, tmp_path, max_grad_norm
):
    config = dataclasses.replace(DIVERGING, max_grad_norm=max_grad_norm)
    with pytest.raises(ValueError, match=r"train: .* is (nan|inf) at step 2; .*train\.learning_rate \(1e\+30\)"):
        train_llava(mini, mini_processor, shapes_split.samples, config, tmp_path, 0, CPU)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_train_llava_that_diverges_at_its_last_step_stops(mini, mini_processor, shapes_split, tmp_path):
    config = dataclasses.replace(DIVERGING, max_steps=1, learning_rate=1e39)  # above the range of float32
    with pytest.raises(ValueError, match=r"a weight is -?(nan|inf) at step 1; .*train\.learning_rate \(1e\+39\)"):
        train_llava(mini, mini_processor, shapes_split.samples, config, tmp_path, 0, CPU)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_train_llava_whose_validation_loss_is_not_finite_stops(mini, mini_processor, shapes_split, tmp_path):
    config = dataclasses.replace(DIVERGING, learning_rate=1e-5, eval_steps=3)
    with pytest.raises(ValueError, match=r"validation loss is nan at step 3; .*train\.learning_rate \(1e-05\)"):
        train_llava(
            mini,
            mini_processor,
            shapes_split.samples,
            config,
            tmp_path,
            0,
            CPU,
            validate=lambda: {"accuracy": 0.5, "loss": math.nan},
        )
