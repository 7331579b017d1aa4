"""Labels of the vision tower's pretraining."""

import numpy as np
import torch

from experiments.data.scenes import COLOURS, SHAPES
from experiments.data.shapes import load_shapes
from experiments.models import scratch
from experiments.training.vision_pretraining import (
    LabelledScenes,
    SceneClassifier,
    object_presence,
    patch_grid_cells,
    view_cells,
)


def test_patch_grid_cells_hold_the_middle_of_each_patch():
    """Patches of 8 pixels have their middles at 4, 12, ..., 44; grid cells of 12 pixels end at 12, 24, 36 and 48."""
    along_side = [0, 1, 1, 2, 3, 3]
    assert patch_grid_cells(8).tolist() == [4 * row + column for row in along_side for column in along_side]


def test_view_cells_of_a_known_layout():
    colour = np.full(16, -1)
    colour[[0, 3, 5, 7, 13]] = 0
    # 0 . . 3
    # . 5 . 7
    # . . . .
    # . 13 . .
    cells = view_cells(colour)
    # the cell, left, right, above, below, next and second next in reading order
    assert cells[0].tolist() == [0, -1, 3, -1, -1, 3, 5]
    assert cells[5].tolist() == [5, -1, 7, -1, 13, 7, 13]
    assert cells[7].tolist() == [7, 5, -1, 3, -1, 13, -1]
    assert cells[13].tolist() == [13, -1, -1, 5, -1, -1, -1]
    assert cells[6].tolist() == [6, 5, 7, -1, -1, -1, -1]  # an empty cell is not in reading order


def test_object_presence_matches_the_contents_of_scenes():
    samples = load_shapes("train", 20).samples
    labels = [LabelledScenes(samples)[i] for i in range(20)]
    own = {name: torch.stack([item[name][:, 0] for item in labels]) for name in ("colour", "shape")}
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    expected = [[float(kind in samples.cell_contents(i)) for kind in kinds] for i in range(20)]
    assert object_presence(own["colour"], own["shape"]).tolist() == expected


def test_scene_classifier_loss_depends_on_the_class_token():
    samples = load_shapes("train", 4).samples
    tokenizer = scratch.train_tokenizer(samples, 300)
    torch.manual_seed(0)
    tower = scratch.build_llava(tokenizer, 48, patch=8, width=32, layers=1).model.vision_tower
    items = [LabelledScenes(samples)[i] for i in range(4)]
    pixels = scratch.build_processor(tokenizer, 48, 8).image_processor([i["image"] for i in items], return_tensors="pt")
    labels = {name: torch.stack([item[name] for item in items]) for name in ("colour", "shape")}
    states = []
    tower.register_forward_hook(lambda module, args, output: states.append(output.last_hidden_state))
    loss = SceneClassifier(tower)(**pixels, **labels)["loss"]
    gradient = torch.autograd.grad(loss, states[0])[0]
    assert (gradient[:, 0].abs().amax(1) > 0).all()
