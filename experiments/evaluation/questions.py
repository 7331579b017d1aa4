"""Which position of a batch of questions is what, in the paper's terms."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from experiments.data.encoding import Collator, Encoded, Encoder
from experiments.data.samples import Sample
from experiments.models.feature_cache import Features
from probes import TokenMap


def token_map(model: PreTrainedModel, inputs: Inputs) -> TokenMap:
    """The paper's token types: the instruction is the system prompt and the user's text together (section 3).

    Where in the picture a token lies is not asked: features in the place of pixels would not tell.
    """
    inputs = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
    return TokenMap.from_inputs(model, inputs).merge({"instruction": ["system", "instruction"]})


Inputs = dict[str, Tensor]


class Questions:
    """Questions encoded once, served as left-padded batches as often as wanted: with pixels, or with `features` of the
    split that they are about."""

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: ProcessorMixin,
        batch_size: int,
        device: torch.device,
        features: Features | None = None,
    ) -> None:
        encode: Callable[[Sample], Encoded] = Encoder(processor)
        if features is not None:
            encode = partial(features.encoded, encode)
        self.samples, self.device, self.features = samples, device, features
        with tqdm(samples, desc="encode", leave=False) as bar:
            self.items = [encode(sample) for sample in bar]
        self._collate = Collator(processor, side="left")
        self._loader = DataLoader(self.items, batch_size, collate_fn=self._collate)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.items)

    def batches(self, say: str) -> Iterator[Inputs]:
        for batch in tqdm(self._loader, desc=say, leave=False):
            yield self._here(batch)

    def given(self) -> AbstractContextManager[None]:
        """While inside, a model takes what the batches hold in the place of pixels."""
        return self.features.given() if self.features else contextlib.nullcontext()

    def first(self) -> Inputs:
        """The first question alone."""
        return self._here(self._collate(self.items[:1]))

    def _here(self, batch: Inputs) -> Inputs:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}
