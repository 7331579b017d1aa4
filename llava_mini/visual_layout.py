"""Which pictures belong to which rows of a batch, and where in a row its text is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from .configuration import LlavaMiniConfig

# Where pre-fusion's sequences hold no token of the text.
FILLER, PATCH, COMPRESSED = -1, -2, -3

Pixels = Float[Tensor, "crops channels height width"] | Iterable[Float[Tensor, "frame_crops channels height width"]]


def crops_of(tiles: int) -> int:
    """Crops of a frame that is cut into `tiles` x `tiles`: the tiles and the whole picture, or the picture alone."""
    return 1 if tiles == 1 else tiles * tiles + 1


@dataclass(frozen=True)
class VisualLayout:
    """The pictures of a batch in the order of their pixels. A picture is an image or a video; an image has one frame.

    Args:
        row: The row that each picture belongs to, in ascending order.
        frames: Frames of each picture.
        tiles: Each of its frames is cut into `tiles` x `tiles`.
    """

    row: Int[Tensor, " pictures"]
    frames: Int[Tensor, " pictures"]
    tiles: Int[Tensor, " pictures"]

    @classmethod
    def read(
        cls,
        columns: Int[Tensor, "pictures 3"] | None,
        placeholders: Int[Tensor, " rows"],
        pixel_values: Pixels,
    ) -> VisualLayout:
        """From the model's `visual_layout`; without one, every crop is an image, and they share the placeholders evenly.

        Raises:
            ValueError: If the layout does not fit the rows or the pixels.
        """
        rows, crops = len(placeholders), len(pixel_values) if isinstance(pixel_values, Tensor) else None
        if columns is None:
            if crops is None:
                raise ValueError("a stream of frames needs a visual_layout")
            columns = _single_images(placeholders.cpu(), crops)
        layout = cls(*columns.cpu().unbind(dim=1))
        if (layout.row.diff() < 0).any() or not ((layout.row >= 0) & (layout.row < rows)).all():
            raise ValueError(f"visual_layout names rows {layout.row.tolist()}; they must ascend within 0 to {rows - 1}")
        if (layout.frames < 1).any() or (layout.tiles < 1).any():
            raise ValueError("visual_layout must give every picture at least one frame and one tile a side")
        needed = sum(crops_of(tiles) for tiles in layout.frame_tiles)
        if crops is not None and crops != needed:
            raise ValueError(f"pixel_values hold {crops} crops, but the pictures of visual_layout have {needed}")
        return layout

    @property
    def frame_row(self) -> Int[Tensor, " frames"]:
        return self.row.repeat_interleave(self.frames)

    @property
    def frame_tiles(self) -> list[int]:
        return self.tiles.repeat_interleave(self.frames).tolist()

    @property
    def frame_weight(self) -> Float[Tensor, " frames"]:
        """The share of each frame in its row's text: a row's pictures weigh the same, and so do a picture's frames."""
        pictures = torch.bincount(self.row)[self.row]  # of the same row
        return (1 / (self.frames * pictures)).repeat_interleave(self.frames)

    def select(self, rows: Int[Tensor, " rows"]) -> tuple[VisualLayout, Int[Tensor, " frames"]]:
        """The layout of a batch whose rows have the pictures of these rows, and which of this layout's frames each of
        its frames is."""
        row, picture = (rows[:, None] == self.row).nonzero().unbind(dim=1)
        frame = (rows[:, None] == self.frame_row).nonzero()[:, 1]
        return VisualLayout(row, self.frames[picture], self.tiles[picture]), frame

    def chunks(
        self, pixel_values: Pixels, size: int, first: int = 0
    ) -> Iterator[tuple[slice, Float[Tensor, "frames crops channels height width"]]]:
        """At most `size` successive frames at a time, all cut alike, from the frame `first` on: which they are, and
        their pixels.

        Raises:
            ValueError: If a stream ends early or gives a frame with another number of crops.
        """
        stream = islice(() if isinstance(pixel_values, Tensor) else pixel_values, first, None)
        start, first_crop = first, sum(crops_of(tiles) for tiles in self.frame_tiles[:first])
        for tiles, run in groupby(self.frame_tiles[first:]):
            end, crops = start + len(list(run)), crops_of(tiles)
            while start < end:
                count = min(size, end - start)
                if isinstance(pixel_values, Tensor):
                    pixels = pixel_values[first_crop : first_crop + count * crops].unflatten(0, (count, crops))
                    first_crop += count * crops
                else:
                    pixels = _stacked(list(islice(stream, count)), count, crops)
                yield slice(start, start + count), pixels
                start += count

    def fused_text(
        self,
        is_visual: Bool[Tensor, "rows length"],
        attention_mask: Int[Tensor, "rows seen"] | None,
        answer_mask: Bool[Tensor, "rows ending"] | None,
    ) -> Bool[Tensor, "rows length"]:
        """The text that pre-fusion fuses: of rows with pictures, neither padding nor answers."""
        is_text = torch.zeros_like(is_visual)
        is_text[self.row.unique()] = True
        is_text &= ~is_visual
        if attention_mask is not None:
            is_text &= attention_mask[:, -is_text.shape[1] :] > 0
        if answer_mask is not None:  # may start later than the row, or with what the cache holds already
            is_text &= ~nn.functional.pad(answer_mask, (is_text.shape[1] - answer_mask.shape[1], 0))
        return is_text

    def check_placeholders(self, placeholders: Int[Tensor, " rows"], frame_tokens: Int[Tensor, " frames"]) -> None:
        """Raises a ValueError unless every row has a placeholder for each visual token of its pictures."""
        expected = torch.zeros(len(placeholders), dtype=torch.long).index_add_(0, self.frame_row, frame_tokens)
        wrong = (expected != placeholders.cpu()).nonzero().flatten().tolist()
        if wrong:
            row = wrong[0]
            raise ValueError(
                f"row {row} has {int(placeholders[row])} placeholders, but its {int((self.row == row).sum())} pictures "
                f"become {int(expected[row])} visual tokens; make input_ids and pixel_values with the same processor"
            )


def _single_images(placeholders: Int[Tensor, " rows"], images: int) -> Int[Tensor, "images 3"]:
    each = int(placeholders.sum()) // images if images else 0
    if each:
        row = torch.arange(len(placeholders)).repeat_interleave(placeholders // each)
    else:  # no visual tokens (compressor_size=0): one image a row
        row = torch.arange(len(placeholders))
    if len(row) != images:
        raise ValueError(
            f"got {images} images for rows with {placeholders.tolist()} placeholders; every image takes as many, and "
            "what is no single image a row needs the processor's visual_layout"
        )
    return torch.stack([row, torch.ones_like(row), torch.ones_like(row)], dim=1)


def _stacked(frames: list[Tensor], count: int, crops: int) -> Tensor:
    if len(frames) != count:
        raise ValueError(f"the stream of frames ended {count - len(frames)} frames early")
    if any(len(frame) != crops for frame in frames):
        raise ValueError(f"a streamed frame has {[len(f) for f in frames]} crops where visual_layout says {crops}")
    return torch.stack(frames)


def pack(
    embeds: Float[Tensor, "rows length width"], chosen: Bool[Tensor, "rows length"]
) -> tuple[Float[Tensor, "rows most width"], Bool[Tensor, "rows most"]]:
    """The chosen positions of every row, moved to its start, and which places they fill."""
    counts = chosen.sum(dim=1)
    filled = torch.arange(int(counts.max()), device=chosen.device) < counts[:, None]  # (rows, most)
    packed = embeds.new_zeros(*filled.shape, embeds.shape[-1])
    return packed.masked_scatter(filled[..., None], embeds[chosen]), filled


def prefusion_positions(
    config: LlavaMiniConfig,
    input_ids: Int[Tensor, "batch length"],
    pixel_values: Pixels,
    attention_mask: Int[Tensor, "batch length"] | None = None,
    answer_mask: Bool[Tensor, "batch ending"] | None = None,
    visual_layout: Int[Tensor, "pictures 3"] | None = None,
    **kwargs: Any,
) -> tuple[Int[Tensor, "frames positions"], Int[Tensor, " frames"]]:
    """For each frame what its sequence in pre-fusion holds, and the row of the batch that its text is from.

    PATCH stands for each patch, of the tiles and then of the whole frame, COMPRESSED for the compressed tokens that go
    through with them; then come the positions of the text in its row. FILLER follows where a row has less text or a
    frame fewer crops than others. Arguments as in `LlavaMiniModel.forward`; others are left alone.

    Raises:
        ValueError: If there are no pre-fusion layers, or the layout does not fit the rows or the pixels.
    """
    if not config.prefusion_layers:
        raise ValueError("this LLaVA-Mini has prefusion_layers=0: nothing is fused")
    is_visual = (input_ids == config.image_token_id).cpu()
    layout = VisualLayout.read(visual_layout, is_visual.sum(dim=1), pixel_values)
    tiles = torch.tensor(layout.frame_tiles)
    vision: Any = config.vision_config
    # of a crop; a stream is not looked into, and has the tower's own size
    height, width = pixel_values.shape[-2:] if isinstance(pixel_values, Tensor) else [vision.image_size] * 2
    patches = (height // vision.patch_size) * (width // vision.patch_size)
    if config.compressor == "none":  # the tower's first token may be among them
        patches = int(is_visual.sum()) // int(tiles.square().sum())
    through = config.prefuse_visual_tokens and config.compressor != "none"
    masks = (mask if mask is None else mask.cpu() for mask in (attention_mask, answer_mask))
    is_text = layout.fused_text(is_visual, *masks)

    counts = torch.tensor([crops_of(n) for n in layout.frame_tiles]) * patches
    visual = torch.full((len(tiles), int(counts.max()) + config.compressor_size**2 * through), FILLER)
    ends = counts[:, None] + config.compressor_size**2 * through
    place = torch.arange(visual.shape[1])
    visual[place < ends] = COMPRESSED
    visual[place < counts[:, None]] = PATCH
    text, filled = pack(torch.arange(is_text.shape[1]).expand(is_text.shape)[..., None], is_text)
    text = text[..., 0].masked_fill(~filled, FILLER)[layout.frame_row]
    held = torch.cat([visual, text], dim=1)
    return held.gather(1, (held == FILLER).to(torch.uint8).argsort(dim=1, stable=True)), layout.frame_row
