"""Where in its picture each visual token lies: image, frame, tile, row, column and box in pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig

Box = tuple[float, float, float, float]  # left, top, right, bottom
Edges = tuple[Float[Tensor, "columns 2"], Float[Tensor, "rows 2"]]
NO_BOX: Box = (float("nan"),) * 4  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Grid:
    """Consecutive visual tokens that cover a rectangle of one picture, row by row.

    Args:
        picture: The image or video it belongs to, counted over the batch in reading order.
        rows, columns: Tokens down and across. Without columns and with a newline the grid is one token that stands for
            no part of the picture: it has no row, no column and no box.
        box: What the whole grid covers, in pixels of the original picture. It may reach beyond the picture where that
            was padded. NO_BOX where the size of the original is not known.
        frame: Of a video, counted from 0.
        tile: Of a picture that is cut into several, counted from 0 in the order of the tokens. `[rows, columns]` where
            the grid is stitched from several.
        newline: Whether a token follows every row that stands for no part of the picture: it has a row and no column,
            and the frame and tile of the token before it.
        edges: Left and right of every column `[columns, 2]`, top and bottom of every row `[rows, 2]`, where these do
            not divide the box evenly.
        shared: Whether every token covers the whole box, as those do that attend to all patches.
    """

    picture: int
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
        """Left and right of every column, top and bottom of every row, in pixels of the original picture."""
        if self.edges is not None:
            return self.edges
        left, top, right, bottom = self.box
        ends = ((left, right, self.columns), (top, bottom, self.rows))
        if self.shared:
            across, down = (torch.tensor([[start, stop]]).double().expand(count, 2) for start, stop, count in ends)
        else:
            cuts = [torch.linspace(start, stop, count + 1, dtype=torch.float64) for start, stop, count in ends]
            across, down = (torch.stack([cut[:-1], cut[1:]], -1) for cut in cuts)
        return across, down


# What a family needs to lay out its visual tokens: the model's config, what the model is called with, the size
# (height, width) of each original picture in reading order or None, and the processor or None. It gives None for a
# variant whose layout it does not know.
Family = Callable[[PretrainedConfig, Mapping[str, Any], Sequence[tuple[int, int]] | None, Any], list[Grid] | None]
FAMILIES: dict[str, Family] = {}


def family(*model_types: str) -> Callable[[Family], Family]:
    """Registers how the visual tokens of these `config.model_type`s are laid out."""

    def register(function: Family) -> Family:
        FAMILIES.update(dict.fromkeys(model_types, function))
        return function

    return register


def picture_sizes(inputs: Mapping[str, Any], images: Sequence[Any] | None) -> list[tuple[int, int]] | None:
    """(height, width) of the original pictures of a batch in reading order, or None where nothing tells.

    Args:
        inputs: What the model is called with: their `image_sizes` are taken where there are no `images`.
        images: The pictures, or a list of them for each row: PIL images, arrays (height, width, channels) or (channels,
            height, width), arrays of a video's frames, or (height, width) themselves.

    Raises ValueError for a picture of another kind.
    """
    if images is None:
        sizes = inputs.get("image_sizes")
        return None if sizes is None else [(int(height), int(width)) for height, width in sizes]
    return [size for image in images for size in _sizes(image)]


def _sizes(image: Any) -> list[tuple[int, int]]:
    if isinstance(image, (list, tuple)):
        if len(image) == 2 and all(isinstance(side, int) for side in image):
            return [(image[0], image[1])]
        return [size for one in image for size in _sizes(one)]
    if hasattr(image, "shape"):  # an array or a tensor
        shape = tuple(image.shape[1:] if len(image.shape) == 4 else image.shape)
        if len(shape) == 3:
            shape = shape[:2] if shape[2] in (1, 3, 4) else shape[1:]
        if len(shape) == 2:
            return [(int(shape[0]), int(shape[1]))]
    elif hasattr(image, "size"):  # a PIL image
        return [(image.height, image.width)]
    raise ValueError(f"a picture is a PIL image, an array or (height, width); got {type(image).__name__}")


def size_of(sizes: Sequence[tuple[int, int]] | None, picture: int, pictures: int) -> tuple[int, int] | None:
    """Size of one of so many pictures, None where it is not known. ValueError for sizes of another number of them."""
    if sizes is None:
        return None
    if len(sizes) != pictures:
        raise ValueError(f"the inputs hold {pictures} pictures, but {len(sizes)} images or image_sizes are given")
    return sizes[picture]


def pixels_of(inputs: Mapping[str, Any], name: str = "pixel_values") -> Any:
    """`inputs[name]`; ValueError where the text has visual tokens for it and there is none."""
    if inputs.get(name) is None:
        raise ValueError(f"input_ids hold visual tokens that the inputs have no {name} for")
    return inputs[name]


def reading_order(inputs: Mapping[str, Any], lengths: Mapping[int, Sequence[int]]) -> list[tuple[int, int]]:
    """Every picture of the batch in reading order: its token id, and its number among those of this id.

    Args:
        inputs: What the model is called with.
        lengths: By token id (of images, of videos) how many tokens each picture of that kind has, in reading order.
    """
    attended = inputs.get("attention_mask")
    ids = inputs["input_ids"] if attended is None else inputs["input_ids"][attended > 0]
    ids = ids[torch.isin(ids, torch.tensor(list(lengths), device=ids.device))].tolist()
    left = {kind: list(enumerate(lengths[kind])) for kind in lengths}
    order, place = [], 0
    while place < len(ids) and left[ids[place]]:  # where they do not fit, `lay_out` says so
        number, length = left[ids[place]].pop(0)
        order.append((ids[place], number))
        place += length
    return order


@dataclass(frozen=True, eq=False)
class Places:
    """Place of each visual token; -1 (box: NaN) at positions that are none. `image` counts within the row."""

    image: Int[Tensor, "batch positions"]
    frame: Int[Tensor, "batch positions"]
    tile: Int[Tensor, "batch positions"]
    row: Int[Tensor, "batch positions"]
    column: Int[Tensor, "batch positions"]
    box: Float[Tensor, "batch positions 4"]

    @classmethod
    def lay_out(
        cls,
        vision: Bool[Tensor, "batch positions"],
        grids: Sequence[Grid],
        samples: Int[Tensor, " batch"] | None = None,
    ) -> Places:
        """Puts the tokens of the grids, in order, on the visual positions, in reading order.

        Args:
            vision: Which positions are visual.
            grids: Of all pictures of the batch.
            samples: Which sample each row belongs to, ascending, where a picture has several rows. Each row is a sample
                by default.

        Raises ValueError when they do not fit: other numbers of tokens, or a picture that would straddle two samples.
        """
        tokens = torch.cat([_tokens(grid) for grid in grids]) if grids else torch.empty(0, 9)
        count = int(vision.sum())
        if len(tokens) != count:
            raise ValueError(f"the pictures have {len(tokens)} visual tokens, input_ids {count}: are they of one call?")
        picture, row = tokens[:, 0].long(), vision.nonzero()[:, 0].cpu()
        sample = row if samples is None else samples.cpu()[row]
        pictures, samples_there = int(picture.max()) + 1 if count else 0, int(sample.max()) + 1 if count else 0
        owner = torch.full((pictures,), samples_there).scatter_reduce(0, picture, sample, "amin")
        if (owner[picture] != sample).any():
            wrong = int(picture[owner[picture] != sample][0])
            raise ValueError(f"the visual tokens of picture {wrong} straddle two rows: are they of one call?")
        first = torch.full((samples_there,), pictures).scatter_reduce(0, sample, picture, "amin")
        tokens[:, 0] -= first[sample]

        def spread(values: Tensor, empty: float) -> Tensor:
            full = torch.full((*vision.shape, *values.shape[1:]), empty, dtype=values.dtype, device=vision.device)
            full[vision] = values.to(vision.device)
            return full

        image, frame, tile, row, column = (spread(number.long(), -1) for number in tokens[:, :5].unbind(1))
        return cls(image, frame, tile, row, column, spread(tokens[:, 5:].float(), float("nan")))

    def __getitem__(self, rows: Any) -> Places:
        return Places(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def _tokens(grid: Grid) -> Float[Tensor, "tokens 9"]:
    """Of each token: picture, frame, tile, row, column, left, top, right, bottom."""
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
        last = tile[:, -1:] if grid.columns else torch.as_tensor(grid.tile).expand(grid.rows, 1)
        tile = torch.cat([tile, last], 1)
    numbers = [torch.full_like(row, grid.picture), torch.full_like(row, grid.frame), tile, row, column]
    return torch.cat([torch.stack(numbers, -1).double(), box], -1).flatten(0, 1)
