"""The two pretraining stages of a model from scratch, ahead of its cell's own training."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, ProcessorMixin

from experiments.config.schema import ScratchModel
from experiments.data.mixture import Mixture
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
    """Pretrain the vision tower on labelled scenes, then the rest on descriptions of them and questions, in equal parts.

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
            # Alone, descriptions would leave the words of questions untrained, and learning those would undo the rest.
            Mixture([("", samples.with_descriptions()), ("", samples)]),
            config.caption_pretraining,
            work / "describe",
            seed,
            device,
        )
