"""A sampler whose rows are sorted by size within each training step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class SizeSortedSampler(Sampler[int], TrainerCallback):
    """Yields all rows in random order, with the rows of each step sorted from largest to smallest.

    Rows of one forward pass then have similar lengths and need little padding. They also have one kind where sizes
    distinguish kinds. Which rows form a step stays random, so the gradient is the same as without sorting. LLaVA's
    training code sorts within a step too.

    Trainer's own `group_by_length` sorts over fifty steps. It draws its order from torch's global generator, whose state
    differs in a run that resumed in a later epoch. This sampler draws the order from the seed and the epoch alone.

    Args:
        sizes: A sortable size for each row.
        batch_size: Rows of a step.
        seed: Seed of the order.
    """

    def __init__(self, sizes: Sequence[Any], batch_size: int, seed: int) -> None:
        self.sizes, self.batch_size, self.seed = sizes, batch_size, seed
        self.epoch = 0

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch, on which the order depends; Trainer calls this."""
        self.epoch = int(state.epoch or 0)  # a fraction if a run resumes within an epoch

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for step in torch.randperm(len(self), generator=generator).split(self.batch_size):
            yield from sorted(step.tolist(), key=self.sizes.__getitem__, reverse=True)
