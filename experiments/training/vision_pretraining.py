"""A vision tower that has learned to see before the language model looks: the tiny LLaVA's stand-in for CLIP.

LLaVA starts from a tower trained on other pictures and labels, whose patch features know their surroundings. The tiny
tower is trained here to name, from each patch feature, the place of the grid cell that the patch lies in, and colour
and shape of what is there, of its four neighbours and of the next two things in reading order; the linear heads are then
thrown away. The place matters: rotary positions tell the language model only how far apart tokens are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import CLIPVisionModel, ProcessorMixin

from experiments.config.schema import TrainConfig
from experiments.data.balanced_questions import NEIGHBOURS, beside
from experiments.data.scenes import CELL, COLOURS, GRID, SHAPES, SIDE
from experiments.data.shapes import ShapeSamples
from experiments.training.trainer import fit

VIEWS = 1 + len(NEIGHBOURS) + 2  # the cell itself, its neighbours, the next two things in reading order


class PatchReader(nn.Module):
    """Linear read-out from every patch feature of its cell's place, and of colour and shape in each view (0 for none)."""

    def __init__(self, tower: CLIPVisionModel) -> None:
        super().__init__()
        self.tower = tower
        self.register_buffer("cells", patch_cells(tower.config.patch_size), persistent=False)
        classes = {"colour": VIEWS * (1 + len(COLOURS)), "shape": VIEWS * (1 + len(SHAPES)), "place": GRID * GRID}
        self.heads = nn.ModuleDict({name: nn.Linear(tower.config.hidden_size, n) for name, n in classes.items()})

    def forward(
        self,
        pixel_values: Float[Tensor, "batch 3 side side"],
        colour: Int[Tensor, "batch cells views"],
        shape: Int[Tensor, "batch cells views"],
    ) -> dict[str, Tensor]:
        features = self.tower(pixel_values).last_hidden_state[:, 1:]  # without the class token
        place = torch.arange(GRID * GRID, device=features.device).expand(len(features), -1)[..., None]
        losses = []
        for name, labels in (("colour", colour), ("shape", shape), ("place", place)):
            wanted = labels[:, self.cells].flatten()  # one for each patch and view
            losses.append(F.cross_entropy(self.heads[name](features).view(len(wanted), -1), wanted))
        return {"loss": torch.stack(losses).sum()}


def views(colour: Int[np.ndarray, " cells"]) -> Int[np.ndarray, "cells views"]:
    """For each cell the cells that its views show, -1 for none; needs only which cells are empty (-1)."""
    shown = np.full((GRID * GRID, VIEWS), -1)
    shown[:, 0] = np.arange(GRID * GRID)
    for cell in range(GRID * GRID):
        for word, neighbour in beside(cell, GRID):
            shown[cell, 1 + list(NEIGHBOURS).index(word)] = neighbour
    filled = np.flatnonzero(colour >= 0)
    for step in (1, 2):
        shown[filled[:-step], VIEWS - 3 + step] = filled[step:]
    return shown


class LabelledScenes(Dataset[dict[str, Any]]):
    """Pictures with the colour and shape that each cell's views show, 0 where there is nothing."""

    def __init__(self, samples: ShapeSamples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scenes = self.samples.scenes
        shown = views(scenes.colour[index])
        labels = {
            name: torch.from_numpy(np.where(shown < 0, 0, getattr(scenes, name)[index][shown] + 1))
            for name in ("colour", "shape")
        }
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
