"""Model and data loading for notebooks."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, ProcessorMixin

from experiments.data.encoding import Collator, SampleEncoder, hide_answers
from experiments.data.length_limit import LengthLimit
from experiments.data.llava_json import load_llava_json
from experiments.data.samples import OneQuestionPerImage, Sample
from experiments.data.shapes import load_shapes
from experiments.models.build import load_checkpoint

__all__ = ["load_batch", "load_checkpoint"]


def load_batch(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    count: int,
    path: str | None = None,
    images: str | None = None,
) -> tuple[list[Sample], dict[str, torch.Tensor]]:
    """Load samples with one question per image, and encode them as one batch with the right answers as labels.

    Args:
        model: The model that reads the batch; the tensors go to its device.
        processor: The model's processor.
        count: Number of images.
        path: Conversations in LLaVA's JSON format; without it, the generated shapes of the test split.
        images: Folder of the images that the conversations name.

    Returns:
        The samples, and the inputs of the model (padded on the left) with `labels`.

    Raises:
        ValueError: If only one of `path` and `images` is given, the data set is malformed, or the processor cannot
            encode a sample.

    Example:
        >>> from experiments.models.notebook import load_batch
        >>> samples, inputs = load_batch(model, processor, 6)
        >>> len(samples), inputs["labels"].shape == inputs["input_ids"].shape
        (6, True)
    """
    if (path is None) != (images is None):
        raise ValueError(f"load_batch: path={path!r} and images={images!r}; give both or neither")
    split = (
        load_shapes("test", count) if path is None or images is None else load_llava_json(path, images, "test", count)
    )
    samples = list(OneQuestionPerImage(split.samples))
    encode = SampleEncoder(processor, LengthLimit.for_model(model.config))
    batch = hide_answers(Collator(processor, side="left")([encode(sample) for sample in samples]))
    return samples, {name: part.to(model.device) for name, part in batch.items()}
