"""Layout of a batch: which images and videos belong to which row, and which tokens of a row pre-fusion fuses."""

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

# Values of `prefusion_positions` at sequence positions that do not hold a token of the text.
FILLER, PATCH, COMPRESSED = -1, -2, -3

# Pixels of all crops, or a stream that yields the crops of one frame at a time.
Pixels = Float[Tensor, "crops channels height width"] | Iterable[Float[Tensor, "frame_crops channels height width"]]


def crops_per_frame(tiles: int) -> int:
    """Return the number of crops of a frame with `tiles` x `tiles` tiles.

    These are the tiles and the whole image, or the whole image alone if `tiles` is 1.
    """
    return 1 if tiles == 1 else tiles * tiles + 1


@dataclass(frozen=True)
class VisualLayout:
    """Describe the visual inputs of a batch in the order of their pixels. A visual input is an image or a video.

    Args:
        row (`torch.LongTensor` of shape `(visual_inputs,)`):
            Batch row of each visual input, in ascending order.
        frames (`torch.LongTensor` of shape `(visual_inputs,)`):
            Number of frames of each; an image has one.
        tiles (`torch.LongTensor` of shape `(visual_inputs,)`):
            Tiles along a side: each frame is cut into `tiles` x `tiles`.
    """

    row: Int[Tensor, " visual_inputs"]
    frames: Int[Tensor, " visual_inputs"]
    tiles: Int[Tensor, " visual_inputs"]

    @classmethod
    def read(
        cls,
        columns: Int[Tensor, "visual_inputs 3"] | None,
        placeholders: Int[Tensor, " rows"],
        pixel_values: Pixels,
    ) -> VisualLayout:
        """Read the model's argument `visual_layout`.

        Args:
            columns (`torch.LongTensor` of shape `(visual_inputs, 3)`, *optional*):
                Row, frames and tiles of each visual input. Without it every crop is an image, and all images have the
                same number of placeholders.
            placeholders (`torch.LongTensor` of shape `(rows,)`):
                Number of placeholders in each row.
            pixel_values (`torch.FloatTensor` of shape `(crops, channels, height, width)` or an iterable):
                Pixels of all crops.

        Raises:
            ValueError: If the layout does not match the rows or the pixels.
        """
        rows, crops = len(placeholders), len(pixel_values) if isinstance(pixel_values, Tensor) else None
        if columns is None:
            if crops is None:
                raise ValueError("a stream of frames needs a visual_layout")
            columns = _infer_image_layout(placeholders.cpu(), crops)
        layout = cls(*columns.cpu().unbind(dim=1))
        if (layout.row.diff() < 0).any() or not ((layout.row >= 0) & (layout.row < rows)).all():
            raise ValueError(f"visual_layout names rows {layout.row.tolist()}; they must ascend within 0 to {rows - 1}")
        if (layout.frames < 1).any() or (layout.tiles < 1).any():
            raise ValueError(
                "visual_layout must give every image or video at least one frame and one tile a side; "
                f"got frames {layout.frames.tolist()} and tiles {layout.tiles.tolist()}"
            )
        expected = sum(crops_per_frame(tiles) for tiles in layout.frame_tiles)
        if crops is not None and crops != expected:
            raise ValueError(f"pixel_values holds {crops} crops, but visual_layout describes {expected}")
        return layout

    @property
    def frame_row(self) -> Int[Tensor, " frames"]:
        """Return the batch row of each frame."""
        return self.row.repeat_interleave(self.frames)

    @property
    def frame_tiles(self) -> list[int]:
        """Return the tiles along a side of each frame."""
        return self.tiles.repeat_interleave(self.frames).tolist()

    @property
    def frame_weight(self) -> Float[Tensor, " frames"]:
        """Return the weight of each frame in the mean over its row's fused text.

        All images and videos of a row have the same weight, and so do all frames of a video.
        """
        inputs_in_row = torch.bincount(self.row)[self.row]
        return (1 / (self.frames * inputs_in_row)).repeat_interleave(self.frames)

    def select(self, rows: Int[Tensor, " rows"]) -> tuple[VisualLayout, Int[Tensor, " frames"]]:
        """Build the layout of another batch from rows of this one.

        Args:
            rows: For each row of the new batch, the row of this one whose images and videos it has.

        Returns:
            The new layout, and for each of its frames the index of that frame in this layout.
        """
        row, visual_input = (rows[:, None] == self.row).nonzero().unbind(dim=1)
        frame = (rows[:, None] == self.frame_row).nonzero()[:, 1]
        return VisualLayout(row, self.frames[visual_input], self.tiles[visual_input]), frame

    def chunks(
        self, pixel_values: Pixels, size: int, first: int = 0
    ) -> Iterator[tuple[slice, Float[Tensor, "frames crops channels height width"]]]:
        """Iterate over chunks of successive frames with the same number of tiles.

        Args:
            pixel_values: Pixels of all frames.
            size: Largest number of frames in a chunk.
            first: Index of the first frame; earlier frames are skipped.

        Yields:
            The indices of the chunk's frames, and their pixels.

        Raises:
            ValueError: If a stream ends early or yields a frame with another number of crops.
        """
        stream = islice(() if isinstance(pixel_values, Tensor) else pixel_values, first, None)
        start, first_crop = first, sum(crops_per_frame(tiles) for tiles in self.frame_tiles[:first])
        for tiles, run in groupby(self.frame_tiles[first:]):
            end, crops = start + len(list(run)), crops_per_frame(tiles)
            while start < end:
                count = min(size, end - start)
                if isinstance(pixel_values, Tensor):
                    pixels = pixel_values[first_crop : first_crop + count * crops].unflatten(0, (count, crops))
                    first_crop += count * crops
                else:
                    pixels = _stack_frames(list(islice(stream, count)), count, crops)
                yield slice(start, start + count), pixels
                start += count

    def fused_text(
        self,
        is_visual: Bool[Tensor, "rows length"],
        attention_mask: Int[Tensor, "rows mask_length"] | None,
        answer_mask: Bool[Tensor, "rows answer_length"] | None,
    ) -> Bool[Tensor, "rows length"]:
        """Return the mask of the text tokens that pre-fusion fuses.

        They are in rows with images or videos, and are neither padding nor answers.

        Args:
            is_visual: True at placeholders.
            attention_mask: 0 at padding. It ends with the row and may start earlier, with cached tokens.
            answer_mask: True at answers. It ends with the row and may start earlier or later.
        """
        is_text = torch.zeros_like(is_visual)
        is_text[self.row.unique()] = True
        is_text &= ~is_visual
        if attention_mask is not None:
            is_text &= attention_mask[:, -is_text.shape[1] :] > 0
        if answer_mask is not None:  # starts after the row, or ahead of it with cached tokens
            is_text &= ~nn.functional.pad(answer_mask, (is_text.shape[1] - answer_mask.shape[1], 0))
        return is_text

    def check_placeholders(self, placeholders: Int[Tensor, " rows"], frame_tokens: Int[Tensor, " frames"]) -> None:
        """Check that every row has one placeholder for each visual token of its images and videos.

        Args:
            placeholders: Number of placeholders in each row.
            frame_tokens: Number of visual tokens of each frame.

        Raises:
            ValueError: If a row has another number of placeholders.
        """
        expected = torch.zeros(len(placeholders), dtype=torch.long).index_add_(0, self.frame_row, frame_tokens)
        wrong_rows = (expected != placeholders.cpu()).nonzero().flatten().tolist()
        if wrong_rows:
            row = wrong_rows[0]
            raise ValueError(
                f"row {row} has {int(placeholders[row])} placeholders, but its {int((self.row == row).sum())} images or "
                f"videos give {int(expected[row])} visual tokens; make input_ids, pixel_values and visual_layout in one "
                "call of one processor, and do not truncate or concatenate them"
            )


def pack_rows(
    embeds: Float[Tensor, "rows length width"], mask: Bool[Tensor, "rows length"]
) -> tuple[Float[Tensor, "rows longest width"], Bool[Tensor, "rows longest"]]:
    """Move the masked positions of every row to its start.

    Returns:
        The packed embeddings, zero after a row's last one, and the mask of the positions that they fill.
    """
    counts = mask.sum(dim=1)
    filled = torch.arange(int(counts.max()), device=mask.device) < counts[:, None]  # (rows, longest)
    packed = embeds.new_zeros(*filled.shape, embeds.shape[-1])
    return packed.masked_scatter(filled[..., None], embeds[mask]), filled


def prefusion_positions(
    config: LlavaMiniConfig,
    input_ids: Int[Tensor, "batch length"],
    pixel_values: Pixels,
    attention_mask: Int[Tensor, "batch length"] | None = None,
    answer_mask: Bool[Tensor, "batch answer_length"] | None = None,
    visual_layout: Int[Tensor, "visual_inputs 3"] | None = None,
    **kwargs: Any,
) -> tuple[Int[Tensor, "frames positions"], Int[Tensor, " frames"]]:
    """Describe the sequence that pre-fusion processes for each frame.

    A sequence starts with the patches of the tiles and then of the whole frame. Compressed tokens follow if pre-fusion
    processes them, and then the row's text.

    Args:
        config ([`LlavaMiniConfig`]):
            Configuration of the model.
        input_ids, pixel_values, attention_mask, answer_mask, visual_layout:
            As in [`LlavaMiniModel.forward`].
        kwargs:
            Other arguments of the forward call; they are ignored.

    Returns:
        - `torch.LongTensor` of shape `(frames, positions)`: at each position PATCH, COMPRESSED, or the position of a
          text token in its row. FILLER follows if a row has less text, or a frame fewer crops, than others.
        - `torch.LongTensor` of shape `(frames,)`: batch row of each frame's text.

    Raises:
        ValueError: If there are no pre-fusion layers, or the layout does not match the rows or the pixels.

    Example:
        >>> from llava_mini.visual_layout import prefusion_positions
        >>> ids = torch.tensor([[5, mini.config.image_token_id, 6]])
        >>> positions, rows = prefusion_positions(mini.config, ids, torch.zeros(1, 3, 48, 48))
        >>> positions[0, -3:].tolist()  # the compressed token, then the text at positions 0 and 2
        [-3, 0, 2]
    """
    if not config.prefusion_layers:
        raise ValueError("prefusion_layers=0: this LLaVA-Mini has no pre-fusion layers and fuses no text")
    is_visual = (input_ids == config.image_token_id).cpu()
    layout = VisualLayout.read(visual_layout, is_visual.sum(dim=1), pixel_values)
    tiles = torch.tensor(layout.frame_tiles)
    vision: Any = config.vision_config
    # Size of a crop. A stream must not be consumed here, so its crops have the vision tower's image size.
    height, width = pixel_values.shape[-2:] if isinstance(pixel_values, Tensor) else [vision.image_size] * 2
    patches = (height // vision.patch_size) * (width // vision.patch_size)
    if config.encoded_side is not None:
        patches = config.encoded_side**2
    if config.compressor == "none":  # the vision tower's class token may be among the patches
        patches = int(is_visual.sum()) // int(tiles.square().sum())
    prefuses_compressed = config.prefuse_visual_tokens and config.compressor != "none"
    masks = (mask if mask is None else mask.cpu() for mask in (attention_mask, answer_mask))
    is_text = layout.fused_text(is_visual, *masks)

    num_patches = torch.tensor([crops_per_frame(n) for n in layout.frame_tiles]) * patches
    num_compressed = config.compressor_size**2 * prefuses_compressed
    visual = torch.full((len(tiles), int(num_patches.max()) + num_compressed), FILLER)
    position = torch.arange(visual.shape[1])
    visual[position < num_patches[:, None] + num_compressed] = COMPRESSED
    visual[position < num_patches[:, None]] = PATCH
    text, filled = pack_rows(torch.arange(is_text.shape[1]).expand(is_text.shape)[..., None], is_text)
    text = text[..., 0].masked_fill(~filled, FILLER)[layout.frame_row]
    sequences = torch.cat([visual, text], dim=1)
    fillers_last = (sequences == FILLER).to(torch.uint8).argsort(dim=1, stable=True)
    return sequences.gather(1, fillers_last), layout.frame_row


def _infer_image_layout(placeholders: Int[Tensor, " rows"], images: int) -> Int[Tensor, "images 3"]:
    per_image = int(placeholders.sum()) // images if images else 0
    if per_image:
        row = torch.arange(len(placeholders)).repeat_interleave(placeholders // per_image)
    else:  # without visual tokens (compressor_size=0) there is one image a row
        row = torch.arange(len(placeholders))
    if len(row) != images:
        raise ValueError(
            f"got {images} images for rows with {placeholders.tolist()} placeholders; without the processor's "
            "visual_layout all images must have the same number, or every row one image"
        )
    return torch.stack([row, torch.ones_like(row), torch.ones_like(row)], dim=1)


def _stack_frames(frames: list[Tensor], count: int, crops: int) -> Tensor:
    if len(frames) != count:
        raise ValueError(f"the stream of frames ended {count - len(frames)} frames early")
    if any(len(frame) != crops for frame in frames):
        raise ValueError(f"a streamed frame has {[len(f) for f in frames]} crops, but visual_layout describes {crops}")
    return torch.stack(frames)


__all__ = [
    "COMPRESSED",
    "FILLER",
    "PATCH",
    "Pixels",
    "VisualLayout",
    "crops_per_frame",
    "pack_rows",
    "prefusion_positions",
]
