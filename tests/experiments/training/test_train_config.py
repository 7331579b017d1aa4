"""Rows of a training step per forward pass, and training settings that are refused."""

import pytest

from experiments.config.schema import TrainConfig
from experiments.training.trainer import split_batch


@pytest.mark.parametrize(
    ("batch_size", "rows_per_pass", "processes", "expected"),
    [(256, 0, 1, (256, 1)), (256, 16, 1, (16, 16)), (256, 16, 8, (16, 2)), (256, 64, 8, (32, 1)), (2, 0, 2, (1, 1))],
)
def test_split_batch_of_divisible_rows(batch_size, rows_per_pass, processes, expected):
    assert (
        split_batch(TrainConfig(batch_size=batch_size, per_device_train_batch_size=rows_per_pass), processes)
        == expected
    )


@pytest.mark.parametrize(
    ("batch_size", "rows_per_pass", "processes", "message"),
    [
        (10, 0, 4, r"train\.batch_size: 10 .* 4 processes"),
        (1, 0, 2, r"train\.batch_size: 1 .* 2 processes"),
        (12, 4, 2, r"train\.per_device_train_batch_size: 4 .* 6 rows"),
    ],
)
def test_split_batch_of_indivisible_rows_raises(batch_size, rows_per_pass, processes, message):
    with pytest.raises(ValueError, match=message):
        split_batch(TrainConfig(batch_size=batch_size, per_device_train_batch_size=rows_per_pass), processes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            ({name: -1}, rf"train\.{name}: .*at least 0, found -1")
            for name in ("max_steps", "num_train_epochs", "lora_rank", "per_device_train_batch_size")
        ),
        *(
            ({name: -0.1}, rf"train\.{name}: .*at least 0, found -0\.1")
            for name in ("warmup_steps", "weight_decay", "max_grad_norm")
        ),
        ({"batch_size": 0}, r"train\.batch_size: .*at least 1, found 0"),
        ({"save_steps": 0}, r"train\.save_steps: .*at least 1, found 0"),
        ({"learning_rate": 0.0}, r"train\.learning_rate: .*found 0\.0"),
        ({"projector_learning_rate": float("nan")}, r"train\.projector_learning_rate: .*found nan"),
        ({"prefusion_learning_rate": -1e-4}, r"train\.prefusion_learning_rate: .*found -0\.0001"),
        ({"adam_beta2": 1.0}, r"train\.adam_beta2: .*found 1\.0"),
        ({"optim": "sgd"}, r"train\.optim: .*'sgd'.*adamw or muon"),
        ({"trainable": "tower"}, r"train\.trainable: .*'tower'.*all or projector"),
        ({"lr_scheduler_type": "cosin"}, r"train\.lr_scheduler_type: .*'cosin'.*cosine or"),
        ({"trainable": "projector", "lora_rank": 8}, r"train\.trainable: 'projector' .*lora_rank"),
        ({"trainable": "projector", "train_vision": True}, r"train\.trainable: 'projector' .*train_vision"),
        ({"train_vision": True, "lora_rank": 8}, r"train\.lora_rank: .*leave out train_vision"),
        ({"lora_init": "folder"}, r"train\.lora_init: 'folder' .*train\.lora_rank"),
        ({"optim": "muon", "projector_learning_rate": 1e-5}, r"train\.projector_learning_rate: .*muon"),
        ({"optim": "muon", "prefusion_learning_rate": 1e-5}, r"train\.prefusion_learning_rate: .*muon"),
    ],
)
def test_train_config_with_a_wrong_field_raises_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        TrainConfig(**settings)
    assert "\n" not in str(error.value)
