"""Training on transformers' Trainer: checkpoints, resume, bf16, several processes and loggers are its own."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from experiments.config import TrainConfig
from experiments.data.conversation import Collator, Encoder
from experiments.data.samples import Sample
from experiments.optimizer import MuonAdamW

log = logging.getLogger(__name__)
_TRAINER_STATE = "trainer_state.json"  # Trainer writes it last: a checkpoint that has it whole is whole


class Conversations(Dataset[dict[str, Any]]):
    """Samples, encoded when they are asked for."""

    def __init__(self, samples: Sequence[Sample], encoder: Encoder) -> None:
        self.samples, self.encoder = samples, encoder

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        return {**self.encoder(sample), "image": sample.image}


class ResumingTrainer(Trainer):
    """A Trainer that resumes models whose weights are renamed when they are saved.

    transformers writes LLaVA's weights under the names of its older layout, and Trainer reads them back by name without
    the renaming that `from_pretrained` does: it would go on from the weights at hand, with a warning alone.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if not isinstance(model, PreTrainedModel):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a Trainer's output folder; a half-written one is passed over."""

    def step(path: Path) -> int:
        return int(path.name.rpartition("-")[2])

    for path in sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=step, reverse=True):
        try:
            if json.loads((path / _TRAINER_STATE).read_text())["global_step"] == step(path):
                return path
        except (OSError, ValueError, KeyError):
            log.warning("%s is not whole and is passed over", path)
    return None


def fit(
    model: nn.Module,
    data: Dataset[dict[str, Any]],
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]],
    config: TrainConfig,
    work: Path,
    seed: int,
    device: torch.device,
) -> list[dict[str, float]]:
    """Train in place for `config.steps` steps, from the newest whole checkpoint in `work` if there is one.

    `config.batch_size` images make a step, shared evenly among the processes of a distributed launch.

    Returns:
        Trainer's log: loss, learning rate and gradient norm by step.
    """
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        adam_beta2=config.adam_beta2,
        bf16=config.bf16,
        save_steps=config.save_every,
        save_total_limit=2,
        logging_steps=10,
        seed=seed,
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        report_to="none",
        disable_tqdm=False,
    )
    if config.batch_size % arguments.world_size:
        raise ValueError(
            f"train.batch_size {config.batch_size} cannot be shared evenly by {arguments.world_size} processes"
        )
    arguments.per_device_train_batch_size = config.batch_size // arguments.world_size
    trainer = ResumingTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=collate,
        optimizers=(_optimizer(model, config), None),
    )
    found = last_checkpoint(work)
    if found:
        log.info("resuming from %s", found)
        state = TrainerState.load_from_json(str(found / _TRAINER_STATE))
        if state.global_step == config.steps:  # Trainer would take a step before it sees that it is done
            trainer._load_from_checkpoint(str(found))
            return state.log_history
    trainer.train(resume_from_checkpoint=str(found) if found else None)
    return trainer.state.log_history


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer | None:
    """None leaves the choice to Trainer, which takes AdamW."""
    if config.optimizer == "muon":
        return MuonAdamW(model, config.learning_rate, config.weight_decay, (0.9, config.adam_beta2))
    if config.optimizer != "adamw":
        raise ValueError(f"train.optimizer: no optimizer '{config.optimizer}'; use adamw or muon")
    return None


def train(
    model: nn.Module,
    processor: Any,
    samples: Sequence[Sample],
    config: TrainConfig,
    work: Path,
    seed: int,
    device: torch.device,
) -> list[dict[str, float]]:
    """Train a LLaVA or LLaVA-Mini on conversations, its vision tower frozen unless `config.train_vision`."""
    model.requires_grad_(True)
    model.get_submodule("model.vision_tower").requires_grad_(config.train_vision)
    data = Conversations(samples, Encoder(processor))
    return fit(model, data, Collator(processor), config, work, seed, device)
