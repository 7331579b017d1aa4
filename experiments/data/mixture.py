"""A mixture of several sets of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from experiments.data.samples import IndexedImageLoader, Sample


class Mixture(Sequence[Sample]):
    """Takes a sample of each part in turn, and gives all images new indices.

    Args:
        parts: Pairs of a prefix for question types and samples about one image each.
    """

    def __init__(self, parts: Sequence[tuple[str, Sequence[Sample]]]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(len(samples) for _, samples in self.parts)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        part, number = self.locate(index)
        prefix, samples = self.parts[part]
        sample = samples[number]
        (load,) = sample.loaders
        question_types = [f"{prefix}{question_type}" for question_type in sample.question_types]
        loaders = (IndexedImageLoader(index, load),)  # type: ignore[arg-type]
        return replace(sample, loaders=loaders, question_types=question_types)

    def locate(self, index: int) -> tuple[int, int]:
        """Return the number of the part that a sample comes from, and its index there."""
        number, part = divmod(index, len(self.parts))
        return part, number
