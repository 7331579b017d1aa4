"""What the vision features say about each photograph of a grid: a ceiling for a model that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from experiments.data.photos import PhotoGridSamples, photo_grids
from experiments.data.samples import Sample
from experiments.devices import inference_mode
from experiments.evaluation.accuracy import outcome_digits
from experiments.evaluation.questions import EncodedQuestions
from experiments.evaluation.readouts import READOUT_FOLDS
from probes.readouts.linear_probe import linear_readout


class _Image(NamedTuple):
    grid: PhotoGridSamples
    number: int  # in the grid's samples
    features: Float[Tensor, "patches width"]


def measure_photo_readout(
    model: PreTrainedModel, questions: EncodedQuestions, samples: Sequence[Sample]
) -> dict[str, Any] | None:
    """Measure the `photo_readout` part of a record.

    A linear classifier names each photograph of a grid from the mean of its patches in the features that the projector
    reads. It is tested on photographs that it was not trained on in any image. What it cannot name, a model behind the
    projector can hardly name either, since only the other patches could tell it more.

    Args:
        model: The model.
        questions: One question of each sample.
        samples: The test split's samples, in the same order.

    Returns:
        For each grid size, whether each photograph was named right, image by image and in reading order. None without grids
        of photographs, with fewer photographs than folds, for a model that is no LLaVA or LLaVA-Mini, or if the projector does
        not read one feature a patch of the whole image.
    """
    grids = photo_grids(samples)
    if not any(grids) or not isinstance(model, LlavaForConditionalGeneration):
        return None
    projector_inputs = _projector_inputs(model, questions)
    if len(projector_inputs) != len(grids):  # an image in tiles
        return None
    by_size: dict[int, list[_Image]] = {}
    for entry, features in zip(grids, projector_inputs, strict=True):
        if entry:
            by_size.setdefault(entry[0].grid_size, []).append(_Image(*entry, features))
    for group in by_size.values():
        photos = {photo for image in group for photo in image.grid.photo_numbers(image.number)}
        if len(photos) < READOUT_FOLDS or any(len(image.features) != image.grid.side**2 for image in group):
            return None
    return {
        "label": "class of each photograph, from the mean of its patches",
        "grids": [{"grid_size": size, **_read_photos(group)} for size, group in sorted(by_size.items())],
    }


def _projector_inputs(
    model: LlavaForConditionalGeneration, questions: EncodedQuestions
) -> list[Float[Tensor, "patches width"]]:
    """Return the features of each question's image that the projector reads."""
    captured: list[Tensor] = []
    base: Any = model.model
    hook = base.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0].cpu()))
    try:
        with inference_mode(model), questions.features_as_pixel_values():
            for inputs in questions.batches("vision features"):
                base.get_image_features(pixel_values=inputs["pixel_values"])
    finally:
        hook.remove()
    return [image for batch in captured for image in batch]


def _read_photos(images: Sequence[_Image]) -> dict[str, Any]:
    """Return the number of photographs, and whether each was named right."""
    weights = torch.from_numpy(images[0].grid.patches()).double()  # [cells, patches]
    weights /= weights.sum(1, keepdim=True)
    states = torch.cat([weights @ image.features.double() for image in images])
    names = [name for image in images for name in image.grid.class_names(image.number)]
    photos = [photo for image in images for photo in image.grid.photo_numbers(image.number)]
    readout = linear_readout(states[None], names, pictures=photos, folds=READOUT_FOLDS)
    return {
        "photographs": len(names),
        "correct": outcome_digits(readout.correct[0]),
        "control": outcome_digits(readout.control[0]),
    }
