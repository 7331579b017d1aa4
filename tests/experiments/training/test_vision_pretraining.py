"""Labels of the vision tower's pretraining."""

import numpy as np
import torch

from experiments.data import scenes
from experiments.data.scenes import CELL_SIZE, GRID_SIZE, IMAGE_SIZE
from experiments.training.vision_pretraining import patch_grid_cells, view_cells


def test_patch_grid_cells_match_the_painted_patches():
    """In a scene with one object, exactly the patches of its grid cell are painted."""
    patch = 8
    for cell in range(GRID_SIZE * GRID_SIZE):
        here = np.arange(GRID_SIZE * GRID_SIZE)[None] == cell
        scene = scenes.Scenes(
            colour=np.where(here, 0, -1),
            shape=np.where(here, 0, -1),
            centre=np.full((1, GRID_SIZE * GRID_SIZE, 2), CELL_SIZE / 2),
            radius=np.full((1, GRID_SIZE * GRID_SIZE), 6.0),
            noise_seed=np.array([0]),
        )
        image = scenes.render_scenes(scene)[0].astype(float)
        blocks = image.reshape(IMAGE_SIZE // patch, patch, IMAGE_SIZE // patch, patch, 3).mean((1, 3, 4)).flatten()
        assert torch.equal(patch_grid_cells(patch) == cell, torch.from_numpy(blocks < 220))


def test_view_cells_of_a_known_layout():
    #                 0  1  2   3  4  5   6   7  8: cells 2 and 6 are empty
    colour = np.array([0, 1, -1, 2, 3, 0, -1, 4, 1])
    cells = view_cells(colour)
    # the cell, left, right, above, below, next and second next in reading order
    assert cells[4].tolist() == [4, 3, 5, 1, 7, 5, 7]
    assert cells[1].tolist() == [1, 0, 2, -1, 4, 3, 4]
    assert cells[8].tolist() == [8, 7, -1, 5, -1, -1, -1]
    assert cells[7].tolist() == [7, 6, 8, 4, -1, 8, -1]
    assert cells[6].tolist() == [6, -1, 7, 3, -1, -1, -1]
