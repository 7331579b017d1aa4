"""Position tables of square grids: sine-cosine values, and resampling to another grid."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from . import grid_side


def sincos_table(side: int, width: int) -> Float[Tensor, "side*side width"]:
    """Return the 2-D sine-cosine position table of MAE (arXiv 2111.06377) for a square grid, in row-major order.

    The first half of the width encodes the column, the second half the row. Each half holds all sines, then all cosines,
    at the frequencies 10000^(-4i / width).

    Args:
        side: Side of the grid.
        width: Width of each position vector.

    Raises:
        ValueError: If the width is no multiple of 4.

    Example:
        >>> sincos_table(1, 4)
        tensor([[0., 1., 0., 1.]])
    """
    if width % 4:
        raise ValueError(f"a 2-D sine-cosine table needs a width that is a multiple of 4, got {width}")
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (side, width / 2)
    columns, rows = axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=-1).float()


def resize_table(table: Float[Tensor, "tokens width"], side: int) -> Float[Tensor, "side*side width"]:
    """Resample a square position table to `side` x `side`, bicubically and in float32.

    Args:
        table: Position vectors of a square grid in row-major order.
        side: Side of the new grid.

    Raises:
        ValueError: If the table holds no square grid.
    """
    source = grid_side(table.shape[0])
    if source == side:
        return table
    grid = table.float().T.unflatten(1, (source, source))[None]  # (1, width, source, source)
    grid = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return grid[0].flatten(1).T.to(table.dtype)
