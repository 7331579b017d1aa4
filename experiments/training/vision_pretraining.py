"""Pretraining of the tiny LLaVA's vision tower on labelled scenes, in place of CLIP's pretraining.

LLaVA starts from a vision tower that was pretrained on other images and labels, whose patch features hold their context.
The tiny vision tower is trained here to classify, from each patch feature: the position of the patch's grid cell, and the
colour and shape of the object there, of the nearest object in each direction, and of the next two objects in reading
order. The position matters because rotary positions give the language model only distances between tokens.

The class token is trained to report which objects the scene holds and how many. Its attention then falls on objects, as
CLIP's does, and compressors choose patches by it. The linear heads are discarded.
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
from experiments.data.balanced_questions import NEIGHBOUR_OFFSETS, neighbours
from experiments.data.scenes import CELL_SIZE, COLOURS, GRID_SIZE, IMAGE_SIZE, SHAPES
from experiments.data.shapes import ShapeSamples
from experiments.training.trainer import run_trainer

CELL_COUNT = GRID_SIZE * GRID_SIZE
VIEW_COUNT = 1 + len(NEIGHBOUR_OFFSETS) + 2  # the grid cell itself, its neighbours, the next two objects
OBJECT_KINDS = len(COLOURS) * len(SHAPES)
PRESENCE_WEIGHT = 3.0  # a loss over yes-or-no labels is smaller than one over many classes


class SceneClassifier(nn.Module):
    """Linear heads on the vision tower: on every patch feature, and on the class token.

    A patch is classified by the position of its grid cell, and the colour and shape in each view. A view is a grid cell
    relative to the patch's own one. Class 0 of colour and shape stands for an empty view. The class token's heads report
    which of the 20 kinds of object the scene holds, and how many objects.

    Args:
        vision_tower: The vision tower that is trained.
    """

    def __init__(self, vision_tower: CLIPVisionModel) -> None:
        super().__init__()
        self.vision_tower = vision_tower
        self.register_buffer("cells", patch_grid_cells(vision_tower.config.patch_size), persistent=False)
        class_counts = {
            "colour": VIEW_COUNT * (1 + len(COLOURS)),
            "shape": VIEW_COUNT * (1 + len(SHAPES)),
            "position": CELL_COUNT,
        }
        width = vision_tower.config.hidden_size
        self.class_heads = nn.ModuleDict(
            {"presence": nn.Linear(width, OBJECT_KINDS), "count": nn.Linear(width, 1 + CELL_COUNT)}
        )
        self.patch_heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in class_counts.items()})

    def forward(
        self,
        pixel_values: Float[Tensor, "batch 3 side side"],
        colour: Int[Tensor, "batch cells views"],
        shape: Int[Tensor, "batch cells views"],
    ) -> dict[str, Tensor]:
        """Return the sum of the cross-entropies of all heads, as `loss`."""
        states = self.vision_tower(pixel_values).last_hidden_state
        class_state, features = states[:, 0], states[:, 1:]
        position = torch.arange(CELL_COUNT, device=features.device).expand(len(features), -1)[..., None]
        losses = self._class_losses(class_state, colour[..., 0], shape[..., 0])
        for name, labels in (("colour", colour), ("shape", shape), ("position", position)):
            targets = labels[:, self.cells].flatten()  # one for each patch and view
            losses.append(F.cross_entropy(self.patch_heads[name](features).view(len(targets), -1), targets))
        return {"loss": torch.stack(losses).sum()}

    def _class_losses(
        self,
        class_state: Float[Tensor, "batch width"],
        colour: Int[Tensor, "batch cells"],
        shape: Int[Tensor, "batch cells"],
    ) -> list[Tensor]:
        """Return the losses of the class token's heads."""
        presence = F.binary_cross_entropy_with_logits(
            self.class_heads["presence"](class_state), object_presence(colour, shape)
        )
        count = F.cross_entropy(self.class_heads["count"](class_state), (colour > 0).sum(1))
        return [PRESENCE_WEIGHT * presence, count]


def object_presence(
    colour: Int[Tensor, "batch cells"], shape: Int[Tensor, "batch cells"]
) -> Float[Tensor, "batch kinds"]:
    """Return 1 for each kind of object that a scene holds, and 0 for the others.

    Args:
        colour: Colour class of each grid cell, from 1; 0 in empty cells.
        shape: Shape class of each grid cell, from 1; 0 in empty cells.

    Returns:
        Kinds in the order of colours, the shapes of a colour in a row.

    Example:
        >>> object_presence(torch.tensor([[0, 2]]), torch.tensor([[0, 1]])).nonzero().tolist()  # a green square
        [[0, 4]]
    """
    filled = colour > 0
    kind = torch.where(filled, (colour - 1) * len(SHAPES) + shape - 1, 0)
    presence = torch.zeros(len(colour), OBJECT_KINDS, device=colour.device)
    return presence.scatter_reduce(1, kind, filled.float(), "amax")


class LabelledScenes(Dataset[dict[str, Any]]):
    """Images of scenes with the colour and shape in each view of each grid cell, 0 for an empty view."""

    def __init__(self, samples: ShapeSamples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scenes = self.samples.scenes
        cells = view_cells(scenes.colour[index])
        labels = {
            name: torch.from_numpy(np.where(cells < 0, 0, getattr(scenes, name)[index][cells] + 1))
            for name in ("colour", "shape")
        }
        return {"image": self.samples.render(index), **labels}


def view_cells(colour: Int[np.ndarray, " cells"]) -> Int[np.ndarray, "cells views"]:
    """Return the grid cell in each view of each grid cell, -1 for none.

    Args:
        colour: Colour index in each grid cell; only the sign matters: -1 in empty cells.
    """
    cells = np.full((CELL_COUNT, VIEW_COUNT), -1)
    cells[:, 0] = np.arange(CELL_COUNT)
    for cell in range(CELL_COUNT):
        for direction, neighbour in neighbours(cell, GRID_SIZE, (colour >= 0).tolist()):
            cells[cell, 1 + list(NEIGHBOUR_OFFSETS).index(direction)] = neighbour
    filled = np.flatnonzero(colour >= 0)
    for step in (1, 2):
        cells[filled[:-step], VIEW_COUNT - 3 + step] = filled[step:]
    return cells


def patch_grid_cells(patch: int) -> Int[Tensor, " patches"]:
    """Return the grid cell that holds the middle of each patch, patches in reading order.

    Args:
        patch: Pixels per side of a patch.
    """
    along_side = (torch.arange(IMAGE_SIZE // patch) * patch + patch // 2) // CELL_SIZE
    return (along_side[:, None] * GRID_SIZE + along_side).flatten()


def pretrain_vision_tower(
    vision_tower: CLIPVisionModel,
    processor: ProcessorMixin,
    samples: ShapeSamples,
    config: TrainConfig,
    work: Path,
    seed: int,
    device: torch.device,
) -> None:
    """Train the vision tower in place, on labelled scenes.

    Args:
        vision_tower: The vision tower.
        processor: The model's processor.
        samples: The training scenes.
        config: Training settings.
        work: Folder of the checkpoints, from which an interrupted run resumes.
        seed: Seed of the order of the scenes.
        device: Where to train.
    """

    def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        labels = {name: torch.stack([item[name] for item in items]) for name in ("colour", "shape")}
        return {**processor.image_processor([item["image"] for item in items], return_tensors="pt"), **labels}

    classifier = SceneClassifier(vision_tower).to(device)
    run_trainer(classifier, LabelledScenes(samples), collate, config, work, seed, device)
