import numpy as np
import torch

from experiments.data import scenes
from experiments.data.scenes import CELL, GRID, SIDE
from experiments.tower import patch_cells


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
