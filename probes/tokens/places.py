"""Per-token image coordinates: the image, frame, tile, row, column and pixel box of every visual token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from probes.tokens.grid import Grid


@dataclass(frozen=True, eq=False)
class Places:
    """Hold the image coordinates of every visual token; text and padding have -1, and a NaN box.

    Indexing selects rows of the batch.

    Attributes:
        image: Index of the image or video within its row `[batch, positions]`.
        frame: Frame index within the video.
        tile: Tile index within the image.
        row, column: Position in the grid of the tile, or in the stitched grid; -1 for tokens that cover no part of
            the image.
        box: Left, top, right and bottom `[batch, positions, 4]`, in pixels of the original image.
    """

    image: Int[Tensor, "batch positions"]
    frame: Int[Tensor, "batch positions"]
    tile: Int[Tensor, "batch positions"]
    row: Int[Tensor, "batch positions"]
    column: Int[Tensor, "batch positions"]
    box: Float[Tensor, "batch positions 4"]

    @classmethod
    def from_grids(
        cls,
        vision: Bool[Tensor, "batch positions"],
        grids: Sequence[Grid],
        samples: Int[Tensor, " batch"] | None = None,
    ) -> Places:
        """Assign the tokens of the grids, in order, to the visual positions in reading order.

        Args:
            vision: Mask of the visual positions `[batch, positions]`.
            grids: Grids of all images of the batch.
            samples: Sample that each row belongs to `[batch]`, ascending. Needed where an image spans several rows.
                By default each row is its own sample.

        Returns:
            The coordinates of every position.

        Raises:
            ValueError: If grids and positions hold different numbers of tokens, or an image straddles two samples.

        Example:
            >>> vision = torch.tensor([[False, True, True, True, True]])
            >>> places = Places.from_grids(vision, [Grid(0, 2, 2, (0, 0, 48, 48))])
            >>> places.row.tolist()
            [[-1, 0, 0, 1, 1]]
            >>> places.box[0, 4].tolist()
            [24.0, 24.0, 48.0, 48.0]
        """
        tokens = torch.cat([_token_table(grid) for grid in grids]) if grids else torch.empty(0, 9)
        vision_count = int(vision.sum())
        if len(tokens) != vision_count:
            raise ValueError(
                f"the images have {len(tokens)} visual tokens but input_ids hold {vision_count}; "
                "pass the inputs of one call"
            )
        image, batch_row = tokens[:, 0].long(), vision.nonzero()[:, 0].cpu()
        sample = batch_row if samples is None else samples.cpu()[batch_row]
        image_count = int(image.max()) + 1 if vision_count else 0
        sample_count = int(sample.max()) + 1 if vision_count else 0
        owner = torch.full((image_count,), sample_count).scatter_reduce(0, image, sample, "amin")
        if (owner[image] != sample).any():
            straddling = int(image[owner[image] != sample][0])
            raise ValueError(f"the visual tokens of image {straddling} straddle two rows; pass the inputs of one call")
        first_image = torch.full((sample_count,), image_count).scatter_reduce(0, sample, image, "amin")
        tokens[:, 0] -= first_image[sample]

        def at_vision(values: Tensor, empty: float) -> Tensor:
            full = torch.full((*vision.shape, *values.shape[1:]), empty, dtype=values.dtype, device=vision.device)
            full[vision] = values.to(vision.device)
            return full

        image, frame, tile, row, column = (at_vision(index.long(), -1) for index in tokens[:, :5].unbind(1))
        return cls(image, frame, tile, row, column, box=at_vision(tokens[:, 5:].float(), float("nan")))

    def __getitem__(self, rows: Any) -> Places:
        return Places(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def _token_table(grid: Grid) -> Float[Tensor, "tokens 9"]:
    """Return image, frame, tile, row, column, left, top, right and bottom of each token of a grid."""
    shape = (grid.rows, grid.columns)
    across, down = grid.spans()
    left_right = across.expand(*shape, 2)
    top_bottom = down[:, None].expand(*shape, 2)
    box = torch.stack([left_right[..., 0], top_bottom[..., 0], left_right[..., 1], top_bottom[..., 1]], -1)
    row, column = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    tile = torch.as_tensor(grid.tile).expand(shape)
    if grid.newline:
        row = nn.functional.pad(row, (0, 1), value=-1) if not grid.columns else torch.cat([row, row[:, -1:]], 1)
        column = nn.functional.pad(column, (0, 1), value=-1)
        box = nn.functional.pad(box, (0, 0, 0, 1), value=float("nan"))
        newline_tile = tile[:, -1:] if grid.columns else torch.as_tensor(grid.tile).expand(grid.rows, 1)
        tile = torch.cat([tile, newline_tile], 1)
    indices = [torch.full_like(row, grid.image), torch.full_like(row, grid.frame), tile, row, column]
    return torch.cat([torch.stack(indices, -1).double(), box], -1).flatten(0, 1)
