"""Images and videos that are encoded once and reused for many questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .prefusion import PastKeyValues
from .visual_layout import Pixels, VisualLayout


@dataclass(frozen=True)
class EncodedFrames:
    """Hold the encodings of successive frames with the same number of tiles.

    Args:
        frames (`slice`):
            Indices of the frames, counted through all images and videos of the batch.
        tokens (`torch.FloatTensor` of shape `(frames, tokens, width)`):
            Visual tokens that the language model receives of each frame.
        past (`PastKeyValues`):
            Keys and values of all visual tokens in each pre-fusion layer; empty without such layers.
    """

    frames: slice
    tokens: Float[Tensor, "frames tokens width"]
    past: PastKeyValues

    @property
    def nbytes(self) -> int:
        """Return the bytes of the visual tokens, keys and values."""
        return self.tokens.nbytes + sum(keys.nbytes + values.nbytes for keys, values in self.past)

    def to(self, device: torch.device | str) -> EncodedFrames:
        """Return a copy on another device."""
        past = [(keys.to(device), values.to(device)) for keys, values in self.past]
        return EncodedFrames(self.frames, self.tokens.to(device), past)

    def select_past(self, frame: Int[Tensor, " questions"]) -> PastKeyValues:
        """Return the keys and values of the frames with these indices. A frame may occur several times."""
        index = (frame - self.frames.start).to(self.tokens.device)
        if torch.equal(index, torch.arange(len(self.tokens), device=index.device)):
            return list(self.past)
        return [(keys[index], values[index]) for keys, values in self.past]


@dataclass(frozen=True)
class Pictures:
    """Hold the encoded images and videos of a batch, so that many questions reuse them.

    [`LlavaMiniForConditionalGeneration.encode_pictures`] builds them. `model(input_ids=..., pictures=pictures)` and
    `model.generate(..., pictures=pictures)` return what they return with `pixel_values`. The vision tower does not run
    again, and pre-fusion runs over the text only.

    Encoded frames that exceed the memory limit are dropped, and each question encodes them from their pixels again.

    Args:
        rows (`int`):
            Number of rows of the batch.
        layout (`VisualLayout`):
            Images and videos of each row.
        frame (`torch.LongTensor` of shape `(frames,)`):
            For each frame of `layout`, its index among the frames of `source`.
        source (`VisualLayout`):
            Layout of the images and videos that were encoded.
        kept (`tuple[EncodedFrames, ...]`, *optional*, defaults to `()`):
            Encodings of the first frames of `source`, as far as they fit in memory.
        pixel_values (`torch.FloatTensor` or an iterable, *optional*):
            All pixels of `source` if `kept` lacks frames, else None.

    Example:
        >>> pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
        >>> pictures = mini.encode_pictures(pixels)
        >>> ids = torch.tensor([[5, mini.config.image_token_id, 6], [7, mini.config.image_token_id, 8]])
        >>> mini(input_ids=ids, pictures=pictures.select([0, 0])).logits.shape[:2]
        torch.Size([2, 3])
    """

    rows: int
    layout: VisualLayout
    frame: Int[Tensor, " frames"]
    source: VisualLayout
    kept: tuple[EncodedFrames, ...] = ()
    pixel_values: Pixels | None = None

    @classmethod
    def of_pixels(
        cls,
        pixel_values: Pixels,
        visual_layout: Int[Tensor, "visual_inputs 3"] | None,
        placeholders: Int[Tensor, " rows"],
    ) -> Pictures:
        """Build `Pictures` without encodings, from pixels.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(crops, channels, height, width)` or an iterable):
                Pixels of all crops; see [`LlavaMiniModel.forward`].
            visual_layout (`torch.LongTensor` of shape `(visual_inputs, 3)`, *optional*):
                Row, frames and tiles of each image or video; see [`LlavaMiniModel.forward`].
            placeholders (`torch.LongTensor` of shape `(rows,)`):
                Number of placeholders in each row.

        Raises:
            ValueError: As [`VisualLayout.read`].
        """
        layout = VisualLayout.read(visual_layout, placeholders, pixel_values)
        frames = torch.arange(int(layout.frames.sum()))
        return cls(len(placeholders), layout, frames, layout, pixel_values=pixel_values)

    @property
    def kept_frames(self) -> int:
        """Return how many frames have encodings; each question encodes the others again."""
        return self.kept[-1].frames.stop if self.kept else 0

    @property
    def nbytes(self) -> int:
        """Return the bytes of all encodings.

        Each frame holds its visual tokens, and in each pre-fusion layer 2 x key heads x head width numbers for each
        visual position. Rows with the same images share them.
        """
        return sum(part.nbytes for part in self.kept)

    def asking(self, frames: slice) -> Int[Tensor, " questions"]:
        """Return the indices in `layout` of the frames that use these source frames."""
        return ((self.frame >= frames.start) & (self.frame < frames.stop)).nonzero().flatten()

    def check(self, placeholders: Int[Tensor, " rows"], visual_layout: Int[Tensor, "visual_inputs 3"] | None) -> None:
        """Check that a batch matches these images and videos. Its last rows may be text without images.

        Args:
            placeholders (`torch.LongTensor` of shape `(rows,)`):
                Number of placeholders in each row of the batch.
            visual_layout (`torch.LongTensor` of shape `(visual_inputs, 3)`, *optional*):
                The batch's layout.

        Raises:
            ValueError: If the number of rows or the layout differs.
        """
        rows = len(placeholders)
        # Without a placeholder in any row (compressor_size=0), rows of text cannot be told from rows with images.
        rest_is_text = bool(placeholders.any()) and not placeholders[self.rows :].any()
        if rows < self.rows or (rows > self.rows and not rest_is_text):
            raise ValueError(
                f"pictures has {self.rows} rows, but input_ids has {rows}: pictures.select([...]) assigns a row of "
                "pictures to each row of input_ids"
            )
        columns = torch.stack([self.layout.row, self.layout.frames, self.layout.tiles], dim=1)
        if visual_layout is not None and not torch.equal(columns, visual_layout.cpu()):
            raise ValueError(
                f"visual_layout {visual_layout.tolist()} differs from the layout of pictures, {columns.tolist()}: "
                "omit visual_layout"
            )

    def to(self, device: torch.device | str) -> Pictures:
        """Move the encodings to another device, for example the CPU.

        A forward call moves one chunk of frames at a time to the model's device.
        """
        return replace(self, kept=tuple(part.to(device) for part in self.kept))

    def select(self, rows: Sequence[int]) -> Pictures:
        """Select the images and videos for the rows of another batch. Nothing is copied.

        Args:
            rows (`Sequence[int]`):
                For each row of the new batch, the row of this one whose images and videos it asks about.
                `select([0, 0, 0])` serves three questions about the first row's.

        Returns:
            [`Pictures`]: The selection, with `len(rows)` rows.

        Raises:
            ValueError: If a row does not exist.

        Example:
            >>> pixels = processor.image_processor([image, image], return_tensors="pt")["pixel_values"]
            >>> mini.encode_pictures(pixels).select([1, 0, 0]).rows
            3
        """
        unknown = [row for row in rows if not 0 <= row < self.rows]
        if unknown:
            raise ValueError(f"rows {unknown} do not exist: pictures has {self.rows} rows, counted from 0")
        layout, frame = self.layout.select(torch.tensor(rows, dtype=torch.long))
        return replace(self, rows=len(rows), layout=layout, frame=self.frame[frame])


__all__ = ["EncodedFrames", "Pictures"]
