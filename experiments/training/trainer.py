"""Training of LLaVA and LLaVA-Mini on transformers' Trainer, with its checkpoints, bf16 and distributed launches."""

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
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from experiments.config.schema import PLATEAU_SCHEDULE, TrainConfig
from experiments.data.encoding import Collator, SampleEncoder, restrict_to_answers
from experiments.data.length_limit import LengthLimit
from experiments.data.samples import VIDEO_PLACEHOLDER, Sample
from experiments.models import lora
from experiments.models.feature_cache import VisionFeatureCache
from experiments.models.model_files import shipped_folder
from experiments.models.token_reduction import TokenDropper, keep_all_tokens
from experiments.training.batch_sampler import SizeSortedSampler
from experiments.training.compiled_layers import compile_decoder_layers
from experiments.training.divergence import DivergenceStop
from experiments.training.mixed_precision import train_in_float32
from experiments.training.optimizers import MuonAdamW, set_learning_rate
from experiments.training.plateau import ACCURACY, Validation, learning_rate_factor, stops_at_plateau

PROJECTOR, PREFUSION = "multi_modal_projector", "prefusion"  # parts of the names of their parameters
ADAPTER_FOLDER = "adapter"  # beside the checkpoints
_TRAINER_STATE = "trainer_state.json"  # Trainer writes it last: if it is complete, so is the checkpoint
log = logging.getLogger(__name__)


class ConversationDataset(Dataset[dict[str, Any]]):
    """Samples that are encoded on access.

    Args:
        samples: The samples.
        encoder: Encodes a sample.
        features: Cached vision features that replace the samples' images.
    """

    def __init__(
        self, samples: Sequence[Sample], encoder: SampleEncoder, features: VisionFeatureCache | None = None
    ) -> None:
        self.samples, self.encoder, self.features = samples, encoder, features

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        return self.encoder(sample) if self.features is None else self.features.encode_sample(self.encoder, sample)

    def sizes(self) -> list[tuple[int, int, int]]:
        """Return the numbers of videos, visual inputs and characters of each sample. No image is loaded."""
        return [
            (
                sample.placeholders.count(VIDEO_PLACEHOLDER),
                len(sample.placeholders),
                sum(len(turn["value"]) for turn in sample.conversations),
            )
            for sample in self.samples
        ]


class ResumingTrainer(Trainer):
    """A Trainer with four options, that also resumes models whose weights are renamed when they are saved.

    transformers saves LLaVA's weights under the names of an older layout. `from_pretrained` renames them, and Trainer
    does not: it would warn and continue from the weights in memory.

    Args:
        sampler: Order of the rows; None for Trainer's own.
        part_learning_rates: Learning rate of the parameters whose names hold a key; None for the common one.
        forward_context: Makes the context of a forward call from its inputs.
        learning_rate_factor: Multiplies the learning rate, by step, Trainer's log and warm-up steps; None for the schedule
            of Trainer's arguments.
        callbacks: Callbacks beside the sampler.
        **kwargs: Arguments of Trainer.
    """

    def __init__(
        self,
        *,
        sampler: SizeSortedSampler | None,
        part_learning_rates: Mapping[str, float | None],
        forward_context: Callable[[dict[str, Any]], AbstractContextManager[Any]],
        learning_rate_factor: Callable[[int, list[dict[str, float]], int], float] | None,
        callbacks: Sequence[TrainerCallback],
        **kwargs: Any,
    ) -> None:
        self.size_sorted_sampler, self.part_learning_rates = sampler, part_learning_rates
        self.forward_context, self.learning_rate_factor = forward_context, learning_rate_factor
        super().__init__(callbacks=[*([sampler] if sampler else []), *callbacks], **kwargs)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        if self.size_sorted_sampler is None:
            return super()._get_train_sampler(train_dataset)
        return self.size_sorted_sampler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer, and set the learning rates of parts of the model."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        for part, learning_rate in self.part_learning_rates.items() if is_new else ():
            if learning_rate is not None:
                named_parameters = (self.model if model is None else model).named_parameters()
                set_learning_rate(optimizer, [p for name, p in named_parameters if part in name], learning_rate)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Create the schedule of `learning_rate_factor`, or Trainer's own."""
        factor = self.learning_rate_factor
        if factor is None or self.lr_scheduler is not None:  # type: ignore[has-type]
            return super().create_scheduler(num_training_steps, optimizer)
        warmup_steps = self.args.get_warmup_steps(num_training_steps)
        self.lr_scheduler = LambdaLR(
            self.optimizer if optimizer is None else optimizer,
            lambda step: factor(step, self.state.log_history, warmup_steps),
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss from the logits of answers alone, inside the forward context."""
        with self.forward_context(inputs):
            if "labels" in inputs:
                model_inputs, labels = restrict_to_answers(inputs)
                inputs = model_inputs | {"labels": labels, "use_cache": False}  # nothing is generated
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if not isinstance(model, PreTrainedModel):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        # In float32, as weights are while they train; copying casts the others to their own dtype.
        saved = type(model).from_pretrained(resume_from_checkpoint, dtype=torch.float32)
        model.load_state_dict(saved.state_dict())


def latest_complete_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in a Trainer's output folder, or None. Incomplete ones are skipped."""

    def step(path: Path) -> int:
        return int(path.name.rpartition("-")[2])

    for path in sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=step, reverse=True):
        try:
            if json.loads((path / _TRAINER_STATE).read_text())["global_step"] == step(path):
                return path
        except (OSError, ValueError, KeyError):
            log.warning("checkpoint %s is incomplete and is skipped", path)
    return None


def split_batch(config: TrainConfig, processes: int) -> tuple[int, int]:
    """Split the rows of a training step over processes and forward passes.

    Returns:
        Rows of one forward pass of a process, and forward passes of a process per step.

    Raises:
        ValueError: If the rows cannot be split evenly.
    """
    rows, remainder = divmod(config.batch_size, processes)
    if remainder or not rows:
        raise ValueError(
            f"train.batch_size: {config.batch_size} rows cannot be split evenly over {processes} processes; use a "
            f"multiple of {processes}"
        )
    rows_per_pass = min(config.per_device_train_batch_size or rows, rows)
    if rows % rows_per_pass:
        raise ValueError(
            f"train.per_device_train_batch_size: {rows_per_pass} does not divide the {rows} rows of each process per step "
            f"(train.batch_size {config.batch_size}, processes {processes})"
        )
    return rows_per_pass, rows // rows_per_pass


def set_trainable_parameters(model: nn.Module, config: TrainConfig) -> None:
    """Make the configured parameters trainable, and freeze all others.

    LLaVA-Mini's first stage trains the projector alone, and its second stage all but the vision tower.

    Raises:
        ValueError: If the model has no LLaVA's projector and vision tower, or no trained pre-fusion layers for a learning
            rate of their own.
    """
    base = getattr(model, "model", None)
    if not (hasattr(base, PROJECTOR) and hasattr(base, "vision_tower")):
        raise ValueError(
            f"train: a {type(model).__name__} has no {PROJECTOR} and vision_tower, which training needs; choose a LLaVA, "
            "or leave the model untrained"
        )
    model.requires_grad_(config.trainable == "all")
    model.get_submodule(f"model.{PROJECTOR}").requires_grad_(True)
    model.get_submodule("model.vision_tower").requires_grad_(config.train_vision)
    rate = config.prefusion_learning_rate
    if rate is not None and not any(PREFUSION in name for name, p in model.named_parameters() if p.requires_grad):
        raise ValueError(
            f"train.prefusion_learning_rate: {rate:g} acts on nothing, because no pre-fusion layers are trained outside the "
            "language model; leave it out"
        )


def train_llava(
    model: PreTrainedModel,
    processor: Any,
    samples: Sequence[Sample],
    config: TrainConfig,
    work: Path,
    seed: int,
    device: torch.device,
    drop_tokens: TokenDropper = keep_all_tokens,
    features: VisionFeatureCache | None = None,
    limit: LengthLimit | None = None,
    validate: Callable[[], Mapping[str, float]] | None = None,
) -> list[dict[str, float]]:
    """Train a LLaVA or LLaVA-Mini on conversations, in place.

    With `config.lora_rank`, adapters are trained, saved in `work`, and merged into the model.

    Args:
        model: The model.
        processor: Its processor.
        samples: The training samples.
        config: Training settings.
        work: Folder of the checkpoints, from which an interrupted run resumes.
        seed: Seed of the order of the samples.
        device: Where to train.
        drop_tokens: Drops visual tokens in each forward call.
        features: Feature cache of the split of the samples. The vision tower then runs only for images that it lacks.
        limit: The longest sample that the model accepts.
        validate: Measures the model on the validation split, as `experiments.evaluation.accuracy.validation_scores`; needed
            with `config.eval_steps`.

    Returns:
        Trainer's log, as `run_trainer`.
    """
    dataset = ConversationDataset(samples, SampleEncoder(processor, limit), features)
    sizes = dataset.sizes() if config.group_by_length else None
    set_trainable_parameters(model, config)
    adapted = None
    if config.lora_rank:
        start = None if config.lora_init is None else shipped_folder(config.lora_init)
        adapted = lora.add_adapters(model, config.lora_rank, start)
    forward_context = partial(drop_tokens, model)
    with (
        features.as_pixel_values() if features else nullcontext(),
        train_in_float32(model) if config.bf16 else nullcontext(),
        compile_decoder_layers(model) if config.torch_compile else nullcontext(),
    ):
        history = run_trainer(
            adapted or model, dataset, Collator(processor), config, work, seed, device, sizes, forward_context, validate
        )
        if adapted:
            lora.save_and_merge_adapter(adapted, work / ADAPTER_FOLDER)
    return history


def run_trainer(
    model: nn.Module,
    dataset: Dataset[dict[str, Any]],
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]],
    config: TrainConfig,
    work: Path,
    seed: int,
    device: torch.device,
    sizes: Sequence[Any] | None = None,
    forward_context: Callable[[dict[str, Any]], AbstractContextManager[Any]] = nullcontext,
    validate: Callable[[], Mapping[str, float]] | None = None,
) -> list[dict[str, float]]:
    """Train any module in place with Trainer, from the newest complete checkpoint in `work` if there is one.

    A step has `config.batch_size` rows, over all processes of a distributed launch.

    Args:
        model: A module that returns its loss.
        dataset: The training rows.
        collate: Makes a batch of rows.
        config: Training settings: `max_steps` steps, or `num_train_epochs` epochs, or fewer until a plateau.
        work: Folder of the checkpoints.
        seed: Seed of the order of the rows.
        device: Where to train.
        sizes: Size of each row, by which rows are sorted within a step; see `SizeSortedSampler`.
        forward_context: Makes the context of a forward call from its inputs.
        validate: Measures the model on the validation split; called every `config.eval_steps` steps.

    Returns:
        Trainer's log: loss, learning rate and gradient norm by step, and the measurements of the validation split
        (`experiments.training.plateau.learning_curve`).

    Raises:
        ValueError: If the rows of a step cannot be split evenly, `validate` is missing, or the training diverges.
    """
    if config.eval_steps and validate is None:
        raise ValueError(f"train.eval_steps: {config.eval_steps} needs a function that measures the validation split")
    until_plateau = config.lr_scheduler_type == PLATEAU_SCHEDULE
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=config.max_steps or -1,
        num_train_epochs=config.num_train_epochs,
        learning_rate=config.learning_rate,
        # Trainer's own schedule for plateaus has no warm-up.
        lr_scheduler_type="constant_with_warmup" if until_plateau else config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta2=config.adam_beta2,
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        save_steps=config.save_steps,
        save_total_limit=2,
        # A divisor of the steps between checkpoints, so that a resumed run averages losses over the same steps.
        logging_steps=math.gcd(10, config.save_steps),
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would log a mean in place of NaN, and DivergenceStop would not see it
        seed=seed,
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        report_to="none",
        disable_tqdm=False,
    )
    # One device per process: DataParallel would multiply a step's rows by the devices, and separate rows from images.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    rows_per_pass, passes = split_batch(config, arguments.world_size)
    arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = rows_per_pass, passes
    trainer = ResumingTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collate,
        optimizers=(_build_optimizer(model, config), None),
        sampler=SizeSortedSampler(sizes, config.batch_size, seed) if sizes else None,
        part_learning_rates={PROJECTOR: config.projector_learning_rate, PREFUSION: config.prefusion_learning_rate},
        forward_context=forward_context,
        learning_rate_factor=partial(learning_rate_factor, config) if until_plateau else None,
        callbacks=[
            DivergenceStop(config),
            *([Validation(validate, config)] if validate is not None and config.eval_steps else []),
        ],
    )
    checkpoint = latest_complete_checkpoint(work)
    if checkpoint:
        log.info("resuming from %s", checkpoint)
        state = TrainerState.load_from_json(str(checkpoint / _TRAINER_STATE))
        at_end = state.global_step == (config.max_steps or state.max_steps)
        if at_end or stops_at_plateau(state.log_history, config):  # Trainer would take one more step here
            trainer._load_from_checkpoint(str(checkpoint))
            return _loss_history(state)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return _loss_history(trainer.state)


def _loss_history(state: TrainerState) -> list[dict[str, float]]:
    """Return the log by step, and the step, epoch and FLOPs of its end.

    Trainer's own last entry is left out: it holds times, and means over the steps of this process alone.
    """
    end = {"step": state.global_step, "epoch": state.epoch, "total_flos": state.total_flos}
    return [*(entry for entry in state.log_history if "loss" in entry or ACCURACY in entry), end]


def _build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer | None:
    """Return Muon with AdamW, or None for Trainer's own AdamW."""
    if config.optim == "muon":
        return MuonAdamW(model, config.learning_rate, config.weight_decay, (0.9, config.adam_beta2))
    return None
