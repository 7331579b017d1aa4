"""Several sets of samples as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from experiments.data.samples import Numbered, Sample


class Mixture(Sequence[Sample]):
    """A sample of each part in turn; images are numbered anew. Parts come with what their kinds of question are prefixed
    with. A sample has one image."""

    def __init__(self, parts: Sequence[tuple[str, Sequence[Sample]]]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(len(samples) for _, samples in self.parts)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        prefix, samples = self.parts[index % len(self.parts)]
        sample = samples[index // len(self.parts)]
        (load,) = sample.load
        kinds = [f"{prefix}{kind}" for kind in sample.kinds]
        return replace(sample, load=(Numbered(index, load),), kinds=kinds)  # type: ignore[arg-type]
