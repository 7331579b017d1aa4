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
MOST_KEPT_BYTES = 2 * 2**30
"""Images of more questions than this would fill the memory: those of VQAv2's validation split take 190 GB."""


def instruction_token_map(model: PreTrainedModel, inputs: ModelInputs) -> TokenMap:
    """Return the token map of a batch, with system prompt and user text merged into "instruction" (paper section 3).

    The map has no places: `pixel_values` may be cached features, from which places cannot be derived.
    """
    inputs = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
    return TokenMap.from_inputs(model, inputs).merge({"instruction": ["system", "instruction"]})


class _EncodedOnAccess(Sequence[EncodedSample]):
    """Returns the first samples as they are kept, and encodes any other each time that it is asked for."""

    def __init__(
        self, samples: Sequence[Sample], encode: Callable[[Sample], EncodedSample], kept: Sequence[EncodedSample]
    ) -> None:
        self.samples, self.encode, self.kept = samples, encode, kept

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> EncodedSample:  # type: ignore[override]
        return self.kept[index] if index < len(self.kept) else self.encode(self.samples[index])


def _bytes_in_memory(item: EncodedSample) -> int:
    """Return the bytes of the images and tensors of an encoded sample."""
    images = sum(image.width * image.height * len(image.getbands()) for image in item.get("images", ()))
    return images + sum(value.nbytes for value in item.values() if isinstance(value, Tensor))


class EncodedQuestions:
    """Questions that are encoded and can be iterated repeatedly as left-padded batches.

    Args:
        samples: One sample per question.
        processor: The model's processor.
        batch_size: Questions of a batch.
        device: Device of the batches.
        features: Feature cache of the samples' split. With it, batches hold features as `pixel_values`.
        limit: The longest question that the model accepts, with its image and answer.
        keep: Whether encoded questions stay in memory, with their images, up to `MOST_KEPT_BYTES`. Those that do not are
            encoded again in each pass.

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
        kept: list[EncodedSample] = []
        if keep:
            size = 0
            with tqdm(samples, desc="encoding", leave=False) as bar:
                for sample in bar:
                    item = encode(sample)  # a sample that is not kept is checked too
                    size += _bytes_in_memory(item)
                    if size <= MOST_KEPT_BYTES:
                        kept.append(item)
        self.encoded = _EncodedOnAccess(samples, encode, kept)
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
