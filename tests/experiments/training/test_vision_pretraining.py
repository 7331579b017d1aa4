import numpy as np
import torch

from experiments.data import scenes
from experiments.data.scenes import CELL, GRID, SIDE
from experiments.training.vision_pretraining import patch_cells, views


def test_patch_cells_are_where_the_pixels_say():
    """A scene with one thing: the patches that hold paint are the patches of its cell."""
    patch = 8
    for cell in range(GRID * GRID):
        here = np.arange(GRID * GRID)[None] == cell
        scene = scenes.Scenes(
            colour=np.where(here, 0, -1),
            shape=np.where(here, 0, -1),
            centre=np.full((1, GRID * GRID, 2), CELL / 2),
            radius=np.full((1, GRID * GRID), 6.0),
            noise_seed=np.array([0]),
        )
        image = scenes.render(scene)[0].astype(float)
        blocks = image.reshape(SIDE // patch, patch, SIDE // patch, patch, 3).mean((1, 3, 4)).flatten()
        assert torch.equal(patch_cells(patch) == cell, torch.from_numpy(blocks < 220))


def test_views_by_hand():
    #                 0  1  2   3  4  5   6   7  8: cells 2 and 6 are empty
    colour = np.array([0, 1, -1, 2, 3, 0, -1, 4, 1])
    shown = views(colour)
    # the cell, left, right, above, below, next and second next in reading order
    assert shown[4].tolist() == [4, 3, 5, 1, 7, 5, 7]
    assert shown[1].tolist() == [1, 0, 2, -1, 4, 3, 4]
    assert shown[8].tolist() == [8, 7, -1, 5, -1, -1, -1]
    assert shown[7].tolist() == [7, 6, 8, 4, -1, 8, -1]
    assert shown[6].tolist() == [6, -1, 7, 3, -1, -1, -1]
