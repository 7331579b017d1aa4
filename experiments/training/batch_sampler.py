"""Steps of training whose rows are sorted by size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class SortedSteps(Sampler[int], TrainerCallback):
    """All rows in random order, those of each step sorted, the largest first.

    Rows that a process takes at once are then of like length and need little padding, and are of one kind where sizes
    tell kinds apart. Which rows make a step stays random, so that the gradient is what it would be without; LLaVA's
    training code sorts within a step too. Trainer's own `group_by_length` sorts over fifty steps, and draws its order
    from torch's global generator, which a run resumed in a later epoch finds in another state. This one draws it from
    the seed and the epoch alone.

    Args:
        sizes: Anything that sorts, for each row.
        batch_size: Rows of a step.
        seed: What the order is drawn from.
    """

    def __init__(self, sizes: Sequence[Any], batch_size: int, seed: int) -> None:
        self.sizes, self.batch_size, self.seed = sizes, batch_size, seed
        self.epoch = 0

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.epoch = int(state.epoch or 0)  # a fraction where a run is resumed within an epoch

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for step in torch.randperm(len(self), generator=generator).split(self.batch_size):
            yield from sorted(step.tolist(), key=self.sizes.__getitem__, reverse=True)
