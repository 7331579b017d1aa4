"""The two pretraining stages of a model from scratch, ahead of its cell's own training."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, ProcessorMixin

from experiments.config.schema import ScratchModel
from experiments.data.shapes import ShapeSamples
from experiments.training import trainer, vision_pretraining


def pretrain_from_scratch(
    model: LlavaForConditionalGeneration,
    processor: ProcessorMixin,
    samples: ShapeSamples,
    config: ScratchModel,
    work: Path,
    seed: int,
    device: torch.device,
) -> None:
    """Pretrain the vision tower on labelled scenes, then the whole model on descriptions of them.

    Args:
        model: The model; trained in place.
        processor: Its processor.
        samples: The training scenes.
        config: Training settings of both stages.
        work: Folder of the checkpoints. Each stage has a subfolder, from which an interrupted run resumes.
        seed: Seed of the order of training.
        device: Where to train.
    """
    if config.vision_pretraining.trains:
        vision_pretraining.pretrain_vision_tower(
            model.model.vision_tower, processor, samples, config.vision_pretraining, work / "tower", seed, device
        )
    if config.caption_pretraining.trains:
        trainer.train_llava(
            model,
            processor,
            samples.with_descriptions(),
            config.caption_pretraining,
            work / "describe",
            seed,
            device,
        )
