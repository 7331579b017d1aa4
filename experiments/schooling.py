"""What a model from scratch learns before its cell trains it: to see, then to say what is where."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, ProcessorMixin

from experiments import tower, training
from experiments.config import ScratchModel
from experiments.data.samples import Split
from experiments.data.shapes import ShapeSamples


def scenes_of(train: Split | None) -> ShapeSamples:
    """The training scenes, whose cells are known.

    Raises:
        ValueError: if this is another kind of data.
    """
    if train is None or not isinstance(train.samples, ShapeSamples):
        raise ValueError("model=scratch learns to see from scenes whose content is known; use it with data=shapes")
    return train.samples


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
        tower.pretrain(model.model.vision_tower, processor, samples, config.tower, work / "tower", seed, device)
    if config.describe.trains:
        training.train(model, processor, samples.described(), config.describe, work / "describe", seed, device)
