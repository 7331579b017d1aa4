"""Encoded questions in batches, and their token maps in the paper's token groups."""

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

from experiments.data.encoding import Collator, EncodedSample, SampleEncoder
from experiments.data.length_limit import LengthLimit
from experiments.data.samples import Sample
from experiments.models.feature_cache import VisionFeatureCache
from probes import TokenMap

ModelInputs = dict[str, Tensor]


def instruction_token_map(model: PreTrainedModel, inputs: ModelInputs) -> TokenMap:
    """Return the token map of a batch, with system prompt and user text merged into "instruction" (paper section 3).

    The map has no places: `pixel_values` may be cached features, from which places cannot be derived.
    """
    inputs = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
    return TokenMap.from_inputs(model, inputs).merge({"instruction": ["system", "instruction"]})


class _EncodedOnAccess(Sequence[EncodedSample]):
    """Encodes a sample each time that it is asked for."""

    def __init__(self, samples: Sequence[Sample], encode: Callable[[Sample], EncodedSample]) -> None:
        self.samples, self.encode = samples, encode

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> EncodedSample:  # type: ignore[override]
        return self.encode(self.samples[index])


class EncodedQuestions:
    """Questions that are encoded and can be iterated repeatedly as left-padded batches.

    Args:
        samples: One sample per question.
        processor: The model's processor.
        batch_size: Questions of a batch.
        device: Device of the batches.
        features: Feature cache of the samples' split. With it, batches hold features as `pixel_values`.
        limit: The longest question that the model accepts, with its image and answer.
        keep: Whether encoded questions stay in memory, with their images. If not, each pass encodes them again.

    Raises:
        ValueError: If the processor cannot encode a sample, or if one is too long; with keep=False when it is reached.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: ProcessorMixin,
        batch_size: int,
        device: torch.device,
        features: VisionFeatureCache | None = None,
        limit: LengthLimit | None = None,
        keep: bool = True,
    ) -> None:
        encode: Callable[[Sample], EncodedSample] = SampleEncoder(processor, limit)
        if features is not None:
            encode = partial(features.encode_sample, encode)
        self.samples, self.device, self.features = samples, device, features
        self.encoded: Sequence[EncodedSample] = _EncodedOnAccess(samples, encode)
        if keep:
            with tqdm(samples, desc="encoding", leave=False) as bar:
                self.encoded = [encode(sample) for sample in bar]
        self._collate = Collator(processor, side="left")
        self._loader = DataLoader(self.encoded, batch_size, collate_fn=self._collate)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.encoded)

    def batches(self, progress_label: str) -> Iterator[ModelInputs]:
        """Yield all batches, with a progress bar."""
        for batch in tqdm(self._loader, desc=progress_label, leave=False):
            yield self._to_device(batch)

    def features_as_pixel_values(self) -> AbstractContextManager[None]:
        """Return a context in which the model accepts the `pixel_values` of the batches, pixels or cached features."""
        return self.features.as_pixel_values() if self.features else contextlib.nullcontext()

    def first(self) -> ModelInputs:
        """Return a batch of the first question alone."""
        return self._to_device(self._collate([self.encoded[0]]))

    @property
    def question_types(self) -> list[str]:
        """The type of each question."""
        return [sample.question_types[0] for sample in self.samples]

    def _to_device(self, batch: ModelInputs) -> ModelInputs:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}
