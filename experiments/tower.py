"""A vision tower that has learned to see before the language model looks: the tiny LLaVA's stand-in for CLIP.

LLaVA starts from a tower trained on other pictures and labels. The tiny tower is trained here to name, from each patch
feature, the colour, the shape and the place of the grid cell that the patch lies in; the linear heads are then thrown
away. The place matters: rotary positions tell the language model only how far apart tokens are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import CLIPVisionModel, ProcessorMixin

from experiments.config import TrainConfig
from experiments.data.scenes import CELL, COLOURS, GRID, SHAPES, SIDE
from experiments.data.shapes import ShapeSamples
from experiments.training import fit


class PatchReader(nn.Module):
    """Linear read-out of colour and shape (one class more for an empty cell) and of the cell from every patch feature."""

    def __init__(self, tower: CLIPVisionModel) -> None:
        super().__init__()
        self.tower = tower
        self.register_buffer("cells", patch_cells(tower.config.patch_size), persistent=False)
        classes = {"colour": 1 + len(COLOURS), "shape": 1 + len(SHAPES), "place": GRID * GRID}
        self.heads = nn.ModuleDict({name: nn.Linear(tower.config.hidden_size, n) for name, n in classes.items()})

    def forward(
        self,
        pixel_values: Float[Tensor, "batch 3 side side"],
        colour: Int[Tensor, "batch cells"],
        shape: Int[Tensor, "batch cells"],
    ) -> dict[str, Tensor]:
        features = self.tower(pixel_values).last_hidden_state[:, 1:]  # without the class token
        place = torch.arange(GRID * GRID, device=features.device).expand(len(features), -1)
        losses = [
            F.cross_entropy(self.heads[name](features).flatten(0, 1), labels[:, self.cells].flatten())
            for name, labels in (("colour", colour), ("shape", shape), ("place", place))
        ]
        return {"loss": torch.stack(losses).sum()}


class LabelledScenes(Dataset[dict[str, Any]]):
    """Pictures with the colour and shape of each cell, 0 where it is empty."""

    def __init__(self, samples: ShapeSamples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scenes = self.samples.scenes
        labels = {name: torch.from_numpy(getattr(scenes, name)[index] + 1) for name in ("colour", "shape")}
        return {"image": self.samples.draw(index), **labels}


def patch_cells(patch: int) -> Int[Tensor, " patches"]:
    """The grid cell that each patch lies in, patches in reading order."""
    along = torch.arange(SIDE // patch) * patch // CELL
    return (along[:, None] * GRID + along).flatten()


def pretrain(
    tower: CLIPVisionModel,
    processor: ProcessorMixin,
    samples: ShapeSamples,
    config: TrainConfig,
    work: Path,
    seed: int,
    device: torch.device,
) -> None:
    """Train the tower in place."""

    def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        labels = {name: torch.stack([x[name] for x in items]) for name in ("colour", "shape")}
        return {**processor.image_processor([x["image"] for x in items], return_tensors="pt"), **labels}

    fit(PatchReader(tower).to(device), LabelledScenes(samples), collate, config, work, seed, device)
