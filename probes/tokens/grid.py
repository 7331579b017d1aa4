"""Grids of visual tokens that cover a rectangle of one image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the original image
Edges = tuple[Float[Tensor, "columns 2"], Float[Tensor, "rows 2"]]
NO_BOX: Box = (float("nan"),) * 4  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Grid:
    """Describe consecutive visual tokens that cover a rectangle of one image, row by row.

    Args:
        image: Index of the image or video that the grid belongs to, counted over the batch in reading order.
        rows, columns: Number of tokens down and across. A grid with `columns=0` and a newline is a single token that
            covers no part of the image: it has no row, no column and no box.
        box: Rectangle that the whole grid covers, in pixels of the original image. It exceeds the image where the
            image was padded. NO_BOX if the original size is unknown.
        frame: Frame index in a video, from 0.
        tile: Tile index in an image that is cut into several tiles, from 0 in token order. A grid stitched from
            several tiles has one index per token, `[rows, columns]`.
        newline: Whether a newline token, which covers no part of the image, follows every row. It has a row but no
            column, and the frame and tile of the token before it.
        edges: Left and right of every column `[columns, 2]`, and top and bottom of every row `[rows, 2]`, in pixels.
            Needed only where columns and rows do not divide the box evenly.
        shared: Whether every token covers the whole box, as tokens that attend to all patches do.

    Example:
        >>> grid = Grid(image=0, rows=2, columns=3, box=(0, 0, 60, 40))
        >>> len(grid)
        6
        >>> columns, rows = grid.spans()
        >>> columns.tolist()
        [[0.0, 20.0], [20.0, 40.0], [40.0, 60.0]]
    """

    image: int
    rows: int
    columns: int
    box: Box = NO_BOX
    frame: int = 0
    tile: int | Int[Tensor, "rows columns"] = 0
    newline: bool = False
    edges: Edges | None = None
    shared: bool = False

    def __len__(self) -> int:
        return self.rows * (self.columns + self.newline)

    def spans(self) -> Edges:
        """Return the extent of every column and row in pixels of the original image.

        Returns:
            Left and right of every column `[columns, 2]`, and top and bottom of every row `[rows, 2]`.
        """
        if self.edges is not None:
            return self.edges
        left, top, right, bottom = self.box
        extents = ((left, right, self.columns), (top, bottom, self.rows))
        if self.shared:
            across, down = (torch.tensor([[start, stop]]).double().expand(count, 2) for start, stop, count in extents)
        else:
            cuts = [torch.linspace(start, stop, count + 1, dtype=torch.float64) for start, stop, count in extents]
            across, down = (torch.stack([cut[:-1], cut[1:]], -1) for cut in cuts)
        return across, down
