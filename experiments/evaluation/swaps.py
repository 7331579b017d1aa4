"""Which layer reads which property: answers to minimal pairs whose images are swapped from a layer on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from experiments.data.encoding import EncodedSample, SampleEncoder, restrict_to_answers
from experiments.data.length_limit import LengthLimit
from experiments.data.minimal_pairs import MinimalPair
from experiments.devices import inference_mode
from experiments.evaluation.questions import EncodedQuestions, instruction_token_map
from probes import Swaps, reading_layer, swap_images


def measure_swaps(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pairs: Mapping[str, Sequence[MinimalPair]],
    batch_size: int,
    device: torch.device,
    limit: LengthLimit | None = None,
) -> dict[str, Any]:
    """Measure the `swaps` part of a record.

    Answers are compared at the first token in which they differ, after the tokens that they share.

    Args:
        model: The model.
        processor: Its processor.
        pairs: Minimal pairs by property.
        batch_size: Questions of a batch; both images of a pair are in one batch.
        device: Device of the model.
        limit: The longest question that the model accepts, with its image and answer.

    Returns:
        The reading layer of each property, with its curve.
    """
    layers = {
        name: asdict(reading_layer(swap_pairs(model, processor, chosen, batch_size, device, limit)))
        for name, chosen in pairs.items()
    }
    return {"properties": layers}


def swap_pairs(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pairs: Sequence[MinimalPair],
    batch_size: int,
    device: torch.device,
    limit: LengthLimit | None = None,
) -> Swaps:
    """Return the answers to minimal pairs with their images swapped from each layer on.

    Args:
        model: The model.
        processor: Its processor.
        pairs: Minimal pairs of one property.
        batch_size: Questions of a batch.
        device: Device of the model.
        limit: The longest question that the model accepts, with its image and answer.
    """
    encode = SampleEncoder(processor, limit)
    # Both images with the first image's answer: later tokens do not change what predicts the first that differs.
    samples = [pair.sample(image, answer=0) for pair in pairs for image in (0, 1)]
    questions = EncodedQuestions(samples, processor, 2 * max(batch_size // 2, 1), device, limit=limit)
    differing = [
        first_difference(first, encode(pair.sample(0, answer=1)))
        for first, pair in zip(islice(questions.encoded, 0, None, 2), pairs, strict=True)
    ]
    # From the end, since batches are padded on the left.
    from_end = torch.tensor(
        [
            at - len(first["input_ids"])
            for first, (at, _) in zip(islice(questions.encoded, 0, None, 2), differing, strict=True)
        ]
    )
    answers = torch.stack([ids for _, ids in differing])
    batches, done = [], 0
    with inference_mode(model):
        for inputs in questions.batches("swaps of minimal pairs"):
            chosen = slice(done, done := done + len(inputs["input_ids"]) // 2)
            tokens = instruction_token_map(model, inputs)
            position = torch.arange(tokens.labels.shape[1]) - tokens.labels.shape[1]
            shared = position < from_end[chosen].repeat_interleave(2)[:, None]
            tokens = tokens.relabel({"instruction": tokens.mask("response") & shared.to(tokens.labels.device)})
            batches.append(swap_images(model, tokens, restrict_to_answers(inputs)[0], answers[chosen]))
    return Swaps.join(batches)


def first_difference(first: EncodedSample, second: EncodedSample) -> tuple[int, Int[Tensor, " answers"]]:
    """Return the first position at which two encoded samples differ, and their tokens there.

    Args:
        first: A question with its answer.
        second: The same question with another answer.

    Example:
        >>> first_difference({"input_ids": [7, 8, 1, 2]}, {"input_ids": [7, 8, 3]})
        (2, tensor([1, 3]))
    """
    ids = first["input_ids"], second["input_ids"]
    at = next(i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
    return at, torch.tensor([ids[0][at], ids[1][at]])
