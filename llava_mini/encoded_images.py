"""Pictures that are encoded once, and what pre-fusion keeps of them for every question to come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .prefusion import Past
from .visual_layout import Pixels, VisualLayout


@dataclass(frozen=True)
class EncodedFrames:
    """Successive frames, cut alike.

    Args:
        frames: Which they are, counted through all pictures.
        tokens: What the language model gets of each.
        past: Keys and values of everything visual in each pre-fusion layer; empty without such layers.
    """

    frames: slice
    tokens: Float[Tensor, "frames tokens width"]
    past: Past

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + sum(keys.nbytes + values.nbytes for keys, values in self.past)

    def to(self, device: torch.device | str) -> EncodedFrames:
        past = [(keys.to(device), values.to(device)) for keys, values in self.past]
        return EncodedFrames(self.frames, self.tokens.to(device), past)

    def take(self, frame: Int[Tensor, " asked"]) -> Past:
        """The keys and values of these frames, of which each may be asked about several times."""
        index = (frame - self.frames.start).to(self.tokens.device)
        if torch.equal(index, torch.arange(len(self.tokens), device=index.device)):
            return list(self.past)
        return [(keys[index], values[index]) for keys, values in self.past]


@dataclass(frozen=True)
class Pictures:
    """The pictures of a batch, to ask about as often as one likes: `model(input_ids=..., pictures=pictures)` and
    `model.generate(..., pictures=pictures)` give what they give with the pixels, and neither the vision tower nor, for
    what is visual, pre-fusion runs again. Made by `model.encode_pictures`.

    Frames that were not kept for want of room are encoded anew from their pixels with each question.

    Args:
        rows: Rows of the batch that has these pictures.
        layout: The pictures of each row.
        frame: Which of the frames that were encoded each frame of `layout` is.
        source: The layout of what was encoded.
        kept: The first of its frames, as far as they are kept.
        pixel_values: All pixels of `source` where frames are missing in `kept`, else None.
    """

    rows: int
    layout: VisualLayout
    frame: Int[Tensor, " frames"]
    source: VisualLayout
    kept: tuple[EncodedFrames, ...] = ()
    pixel_values: Pixels | None = None

    @classmethod
    def of_pixels(
        cls, pixel_values: Pixels, visual_layout: Int[Tensor, "pictures 3"] | None, placeholders: Int[Tensor, " rows"]
    ) -> Pictures:
        """With nothing kept. Raises as `VisualLayout.read` does."""
        layout = VisualLayout.read(visual_layout, placeholders, pixel_values)
        frames = torch.arange(int(layout.frames.sum()))
        return cls(len(placeholders), layout, frames, layout, pixel_values=pixel_values)

    @property
    def kept_frames(self) -> int:
        """How many frames are kept; the others are encoded with each question."""
        return self.kept[-1].frames.stop if self.kept else 0

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept: for each frame its visual tokens, and in each pre-fusion layer 2 x key heads x head
        width numbers for each visual position. Rows that share pictures share them."""
        return sum(part.nbytes for part in self.kept)

    def asking(self, frames: slice) -> Int[Tensor, " asked"]:
        """Which frames of `layout` are among these."""
        return ((self.frame >= frames.start) & (self.frame < frames.stop)).nonzero().flatten()

    def check(self, rows: int, visual_layout: Int[Tensor, "pictures 3"] | None) -> None:
        """Raises a ValueError unless a batch of so many rows, with this layout if any is given, has these pictures."""
        if rows != self.rows:
            raise ValueError(
                f"pictures are of {self.rows} rows, but input_ids have {rows}: pictures.select([...]) says for each row "
                "whose pictures it asks about"
            )
        columns = torch.stack([self.layout.row, self.layout.frames, self.layout.tiles], dim=1)
        if visual_layout is not None and not torch.equal(columns, visual_layout.cpu()):
            raise ValueError(
                f"visual_layout {visual_layout.tolist()} is not that of the pictures, {columns.tolist()}: leave it away"
            )

    def to(self, device: torch.device | str) -> Pictures:
        """With what is kept on another device, such as the CPU: a call moves a chunk of frames at a time to the model."""
        return replace(self, kept=tuple(part.to(device) for part in self.kept))

    def select(self, rows: Sequence[int]) -> Pictures:
        """For a batch whose row i asks about the pictures of row `rows[i]`: `select([0, 0, 0])` for three questions
        about the first row's. Nothing is copied.

        Raises:
            ValueError: If there is no such row.
        """
        unknown = [row for row in rows if not 0 <= row < self.rows]
        if unknown:
            raise ValueError(f"rows {unknown} are unknown: the pictures are of {self.rows} rows, from 0")
        layout, frame = self.layout.select(torch.tensor(rows, dtype=torch.long))
        return replace(self, rows=len(rows), layout=layout, frame=self.frame[frame])


__all__ = ["EncodedFrames", "Pictures"]
