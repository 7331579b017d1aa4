"""Settings that were renamed or added since the first records were written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TRAIN_GROUPS = ("train", "model.vision_pretraining", "model.caption_pretraining")
_TRAIN = {
    "steps": "max_steps",
    "epochs": "num_train_epochs",
    "schedule": "lr_scheduler_type",
    "warmup": "warmup_steps",
    "micro_batch": "per_device_train_batch_size",
    "save_every": "save_steps",
    "optimizer": "optim",
    "lora": "lora_rank",
}
_GROUPS = {"model.tower": "model.vision_pretraining", "model.describe": "model.caption_pretraining"}
_SETTINGS = {
    "data.train": "data.train_samples",
    "data.test": "data.test_samples",
    "prefusion.place": "prefusion.location",
    "reduction.of": "reduction.reference_depth",
    "budget.text": "budget.text_tokens",
    "probe.block": "probe.removal_block_size",
} | {f"{group}.{old}": f"{group}.{new}" for group in _TRAIN_GROUPS for old, new in _TRAIN.items()}
# Records from before a setting existed were made as if it had had this value.
_ADDED_TO_TRAINING = {
    "until": "steps",
    "eval_steps": 0,
    "patience": 3,
    "min_improvement": 0.005,
    "prefusion_learning_rate": None,
    "lora_init": None,
    "torch_compile": False,
}
_ADDED = {
    "data.max_length": None,
    "data.validation_samples": 0,
    "probe.view_questions": 0,
    "probe.swaps": False,
    "probe.swap_pairs": 100,
    **{f"probe.{name}": False for name in ("contribution", "sinks", "leave_out_sinks", "onset")},
    **{f"{group}.{name}": value for group in _TRAIN_GROUPS for name, value in _ADDED_TO_TRAINING.items()},
}

_ADDED_TO_CONVERSATIONS: dict[str, Any] = {  # of data=llava_json alone
    "shares": [],
    "test_images": None,
    "bad": "stop",
    "score": "exact",
    "max_new_tokens": 16,
}


def current_name(key: str) -> str:
    """Return today's name of a setting.

    Args:
        key: Dotted name of a setting, old or current: "train.steps".

    Returns:
        The current name ("train.max_steps"), which is `key` itself if it was never renamed.
    """
    for old, new in _GROUPS.items():
        if key == old or key.startswith(f"{old}."):
            key = new + key[len(old) :]
    return _SETTINGS.get(key, key)


def migrate(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record's configuration with today's names, and with settings that are younger than the record.

    Args:
        config: Nested plain containers, as records hold them.
    """
    migrated = _renamed(config, "")
    for key, value in _ADDED.items():
        *groups, name = key.split(".")
        group: Any = migrated
        for part in groups:
            group = group.get(part) if isinstance(group, dict) else None
        if isinstance(group, dict):
            group.setdefault(name, value)
    data = migrated.get("data")
    if isinstance(data, dict) and {"path", "images"} <= data.keys() and "tasks" not in data:
        migrated["data"] = _ADDED_TO_CONVERSATIONS | data
    return migrated


def _renamed(config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        current_name(prefix + key).rpartition(".")[2]: _renamed(value, f"{prefix}{key}.")
        if isinstance(value, Mapping)
        else value
        for key, value in config.items()
    }
