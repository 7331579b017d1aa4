"""Training on transformers' Trainer: checkpoints, resume, bf16, several processes and loggers are its own."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from experiments.config.schema import TrainConfig
from experiments.data.encoding import Collator, Encoder, on_answers
from experiments.data.samples import VIDEO_SLOT, Sample
from experiments.models import lora
from experiments.models.feature_cache import Features
from experiments.models.token_reduction import Around, untouched
from experiments.training.batch_sampler import SortedSteps
from experiments.training.optimizers import MuonAdamW, give_own_rate

log = logging.getLogger(__name__)
_TRAINER_STATE = "trainer_state.json"  # Trainer writes it last: a checkpoint that has it whole is whole
PROJECTOR, PREFUSION = "multi_modal_projector", "prefusion"  # in the names of their parameters
ADAPTER = "adapter"  # a folder among the checkpoints


class Conversations(Dataset[dict[str, Any]]):
    """Samples, encoded when they are asked for, with features in the place of pictures if there are any."""

    def __init__(self, samples: Sequence[Sample], encoder: Encoder, features: Features | None = None) -> None:
        self.samples, self.encoder, self.features = samples, encoder, features

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        return self.encoder(sample) if self.features is None else self.features.encoded(self.encoder, sample)

    def sizes(self) -> list[tuple[int, int, int]]:
        """Of each sample the number of its videos, of its pictures and of its characters, without a look at a picture."""
        return [
            (s.slots.count(VIDEO_SLOT), len(s.slots), sum(len(turn["value"]) for turn in s.conversations))
            for s in self.samples
        ]


class ResumingTrainer(Trainer):
    """A Trainer that may take rows in an order of ours, may give parts of the model learning rates of their own, may put
    something around the forward calls, and resumes models whose weights are renamed when they are saved.

    transformers writes LLaVA's weights under the names of its older layout, and Trainer reads them back by name without
    the renaming that `from_pretrained` does: it would go on from the weights at hand, with a warning alone.
    """

    def __init__(
        self,
        *,
        order: SortedSteps | None,
        own_rates: Mapping[str, float | None],
        around: Callable[[dict[str, Any]], AbstractContextManager[Any]],
        **kwargs: Any,
    ) -> None:
        self.order, self.own_rates, self.around = order, own_rates, around
        super().__init__(callbacks=[order] if order else None, **kwargs)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        return super()._get_train_sampler(train_dataset) if self.order is None else self.order

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        for part, rate in self.own_rates.items() if fresh else ():
            if rate is not None:
                named = (self.model if model is None else model).named_parameters()
                give_own_rate(optimizer, [p for name, p in named if part in name], rate)
        return optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with self.around(inputs):
            if "labels" in inputs:
                asked, labels = on_answers(inputs)
                inputs = asked | {"labels": labels}
            return super().compute_loss(model, inputs, *args, **kwargs)

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


def share(config: TrainConfig, processes: int) -> tuple[int, int]:
    """How many of a step's rows a process takes at once, and how many times it does.

    Raises:
        ValueError: if the step's rows cannot be shared evenly.
    """
    rows, left = divmod(config.batch_size, processes)
    if left or not rows:
        raise ValueError(f"train.batch_size {config.batch_size} cannot be shared evenly by {processes} processes")
    at_once = min(config.micro_batch or rows, rows)
    if rows % at_once:
        raise ValueError(
            f"train.micro_batch {at_once} does not divide the {rows} rows that each process takes a step "
            f"(train.batch_size {config.batch_size}, processes {processes})"
        )
    return at_once, rows // at_once


def fit(
    model: nn.Module,
    data: Dataset[dict[str, Any]],
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]],
    config: TrainConfig,
    work: Path,
    seed: int,
    device: torch.device,
    sizes: Sequence[Any] | None = None,
    around: Callable[[dict[str, Any]], AbstractContextManager[Any]] = nullcontext,
) -> list[dict[str, float]]:
    """Train in place for `config.steps` steps or `config.epochs` epochs, from the newest whole checkpoint in `work` if
    there is one. `config.batch_size` rows make a step, whatever the processes of a distributed launch.

    Args:
        sizes: What the rows of a step are sorted by; see [`SortedSteps`].
        around: Of the inputs of a forward call: what to run it in.

    Returns:
        Trainer's log: loss, learning rate and gradient norm by step.
    """
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=config.steps or -1,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        adam_beta2=config.adam_beta2,
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        save_steps=config.save_every,
        save_total_limit=2,
        # a divisor of the steps between checkpoints: a resumed run then averages losses over the same steps
        logging_steps=math.gcd(10, config.save_every),
        logging_first_step=True,
        seed=seed,
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        report_to="none",
        disable_tqdm=False,
    )
    # one device a process: DataParallel would count a step's rows once for each, and tear rows from their pictures
    arguments._n_gpu = min(arguments.n_gpu, 1)
    at_once, times = share(config, arguments.world_size)
    arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = at_once, times
    trainer = ResumingTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=collate,
        optimizers=(_optimizer(model, config), None),
        order=SortedSteps(sizes, config.batch_size, seed) if sizes else None,
        own_rates={PROJECTOR: config.projector_learning_rate, PREFUSION: config.prefusion_learning_rate},
        around=around,
    )
    found = last_checkpoint(work)
    if found:
        log.info("resuming from %s", found)
        state = TrainerState.load_from_json(str(found / _TRAINER_STATE))
        if state.global_step == (config.steps or state.max_steps):  # Trainer would take a step before it sees that
            trainer._load_from_checkpoint(str(found))
            return _history(state)
    trainer.train(resume_from_checkpoint=str(found) if found else None)
    return _history(trainer.state)


def _history(state: TrainerState) -> list[dict[str, float]]:
    """The log by step, and where it ended. Trainer's own last entry tells times, and means over what this process ran."""
    ended = {"step": state.global_step, "epoch": state.epoch, "total_flos": state.total_flos}
    return [*(entry for entry in state.log_history if "loss" in entry), ended]


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer | None:
    """None leaves the choice to Trainer, which takes AdamW."""
    if config.optimizer == "muon":
        return MuonAdamW(model, config.learning_rate, config.weight_decay, (0.9, config.adam_beta2))
    return None


def choose_parameters(model: nn.Module, config: TrainConfig) -> None:
    """Let the parameters learn that `config` says, and no others: LLaVA-Mini's first stage trains the projector alone,
    its second all but the vision tower."""
    model.requires_grad_(config.trainable == "all")
    model.get_submodule(f"model.{PROJECTOR}").requires_grad_(True)
    model.get_submodule("model.vision_tower").requires_grad_(config.train_vision)


def train(
    model: PreTrainedModel,
    processor: Any,
    samples: Sequence[Sample],
    config: TrainConfig,
    work: Path,
    seed: int,
    device: torch.device,
    around: Around = untouched,
    features: Features | None = None,
) -> list[dict[str, float]]:
    """Train a LLaVA or LLaVA-Mini on conversations, in place, with `around` around every forward call. With
    `config.lora` adapters are trained, left in `work`, and merged into the model. With `features`, of the split that the
    samples are, its tower runs for those pictures alone that are not kept."""
    data = Conversations(samples, Encoder(processor), features)
    sizes = data.sizes() if config.group_by_length else None
    choose_parameters(model, config)
    adapted = lora.adapt(model, config.lora) if config.lora else None
    within = partial(around, model)
    with features.given() if features else nullcontext():
        history = fit(adapted or model, data, Collator(processor), config, work, seed, device, sizes, within)
    if adapted:
        lora.merge(adapted, work / ADAPTER)
    return history
