"""What a model from scratch learns before its cell trains it: to see, then to say what is where."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, ProcessorMixin

from experiments.config.schema import ScratchModel
from experiments.data.shapes import ShapeSamples
from experiments.training import trainer, vision_pretraining


def school(
    model: LlavaForConditionalGeneration,
    processor: ProcessorMixin,
    samples: ShapeSamples,
    config: ScratchModel,
    work: Path,
    seed: int,
    device: torch.device,
) -> None:
    """Train in place, each stage in a folder of its own below `work` so that a cut run goes on where it was."""
    if config.tower.trains:
        vision_pretraining.pretrain(
            model.model.vision_tower, processor, samples, config.tower, work / "tower", seed, device
        )
    if config.describe.trains:
        trainer.train(model, processor, samples.described(), config.describe, work / "describe", seed, device)
