"""Words of image patches by two lenses, scored on generated scenes whose objects are known.

A patch is named right if the nearest word of a lens is the colour or the shape of the object that it lies on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from experiments.data.encoding import restrict_to_answers
from experiments.data.samples import OneQuestionPerImage
from experiments.data.scenes import CELL_SIZE, COLOURS, GRID_SIZE, IMAGE_SIZE, SHAPES, Scenes, render_scenes
from experiments.data.shapes import PLURAL_NAMES, ShapeSamples
from experiments.devices import inference_mode
from experiments.evaluation.questions import EncodedQuestions
from probes import TokenMap, contextual_lens, logit_lens, record_states
from probes.hooks.decoder import decoder_layers, find_decoder
from probes.hooks.layer_io import input_states
from probes.readouts.logit_lens import decode_one_by_one

SCORED_IMAGES = 300
CORPUS_SCENES = 100
MIN_COVER = 0.25
"""Share of a patch that an object must cover. Rings and triangles hardly ever cover half of one."""

_DIGITS = 5  # decimal places of shares in records


class SceneObject(NamedTuple):
    """Colour and shape of an object, as indices of `COLOURS` and `SHAPES`."""

    colour: int
    shape: int

    @property
    def words(self) -> tuple[str, ...]:
        """The words that name the object right: its colour, and its shape in singular and plural."""
        shape = SHAPES[self.shape]
        return list(COLOURS)[self.colour], shape, PLURAL_NAMES[shape]


def shape_samples(samples: Sequence[Any]) -> ShapeSamples | None:
    """Return the scenes behind the samples of a split; None for other data.

    Args:
        samples: Samples of a split, or one question of each of them.
    """
    inner = samples.samples if isinstance(samples, OneQuestionPerImage) else samples
    return inner if isinstance(inner, ShapeSamples) else None


def description_corpus(samples: ShapeSamples, count: int = CORPUS_SCENES) -> list[str]:
    """Return the descriptions of the first scenes, as a corpus for the contextual lens.

    Args:
        samples: Scenes of a training split.
        count: Number of descriptions; fewer if there are fewer scenes.
    """
    return [sample.answers[0] for sample in islice(samples.with_descriptions(), count)]


def measure_patch_words(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: EncodedQuestions,
    scenes: Scenes,
    corpus: Sequence[str],
) -> dict[str, Any] | None:
    """Measure the `patch_words` part of a record, with one forward pass per batch.

    After 0, 1, ... all layers, the visual tokens' states are read by the logit lens and by the contextual lens
    (`probes.contextual_lens`). The part holds the number of patches named right, by image. Chance is the share that the
    same words would name right if they were dealt to the patches at random.

    Args:
        model: The model.
        processor: Its processor.
        questions: One question of each scene, with pixels; the text after an image does not change its tokens' states.
        scenes: The scenes, in the order of the questions.
        corpus: Texts that the language model reads for the contextual lens.

    Returns:
        The part, or None if no visual token has a known place in the image, as after compression.

    Raises:
        ValueError: If a lens cannot read the model.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    with inference_mode(model):
        lens = contextual_lens(model, tokenizer, corpus)
        depths = range(max(lens.depths) + 1)
        logit_words: list[list[str]] = [[] for _ in depths]
        contextual_words: list[list[str]] = [[] for _ in depths]
        objects: list[SceneObject] = []
        images: list[int] = []
        first = 0
        for inputs in questions.batches("words of patches"):
            rows = range(first, first + len(inputs["input_ids"]))
            first = rows.stop
            model_inputs, _ = restrict_to_answers(inputs)
            tokens = TokenMap.from_inputs(model, inputs, processor, [questions.samples[row].image for row in rows])
            found = list(_objects_of_patches(tokens, scenes, rows))
            if not found:
                continue
            positions = torch.zeros_like(tokens.labels, dtype=torch.bool)
            for row, position, _ in found:
                positions[row, position] = True
            objects += [item for *_, item in found]
            images += [rows[row] for row, *_ in found]
            with logit_lens(model, tokens, positions, top=1) as logits:
                states = _states_by_depth(model, model_inputs, tokens, positions)
            for depth in depths:
                ids = logits.ids[depth, :, 0].tolist()
                logit_words[depth] += [word.strip() for word in decode_one_by_one(tokenizer, ids)]
                contextual_words[depth] += [words[0] for words in lens.read(states[depth], top=1).words]
    if not objects:
        return None
    return {
        "label": "colour or shape of the object on a patch",
        "images": len(scenes),
        "patches": [images.count(image) for image in range(len(scenes))],
        "corpus_words": len(lens.words),
        "depths": [
            {
                "logit": _score(logit_words[depth], objects, images, len(scenes)),
                "contextual": _score(contextual_words[depth], objects, images, len(scenes)),
            }
            for depth in depths
        ],
    }


def object_cells(scenes: Scenes) -> Int[np.ndarray, "scenes side side"]:
    """Return the grid cell of the object that each pixel shows, -1 for the background.

    A pixel shows an object if it is nearer to the object's colour than to the same pixel of the empty scene.

    Args:
        scenes: The scenes.

    Example:
        >>> from experiments.data.scenes import draw_scenes
        >>> object_cells(draw_scenes("test", 0, 2)).shape[0]
        2
    """
    empty = np.full_like(scenes.colour, -1)
    images = render_scenes(scenes).astype(float)
    backgrounds = render_scenes(replace(scenes, colour=empty, shape=empty)).astype(float)
    rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] // CELL_SIZE
    cells = rows * GRID_SIZE + columns
    colours = scenes.colour[:, cells]
    paint = np.array(list(COLOURS.values()), dtype=float)[np.maximum(colours, 0)]
    is_nearer = np.square(images - paint).sum(-1) < np.square(images - backgrounds).sum(-1)
    return np.where((colours >= 0) & is_nearer, cells, -1)


def _objects_of_patches(tokens: TokenMap, scenes: Scenes, rows: range) -> Iterator[tuple[int, int, SceneObject]]:
    """Yield row, position and object of each visual token of a batch that lies on an object.

    Args:
        tokens: Token map of the batch.
        scenes: All scenes.
        rows: Indices of the batch's scenes.
    """
    if tokens.places is None:
        return
    batch = scenes[rows.start : rows.stop]
    cells = object_cells(batch)
    for row, position in tokens.mask("vision").nonzero().tolist():
        left, top, right, bottom = tokens.places.box[row, position].tolist()
        if math.isnan(left):
            continue
        patch = cells[row, round(top) : round(bottom), round(left) : round(right)]
        counts = Counter(patch[patch >= 0].tolist())
        cell, covered = counts.most_common(1)[0] if counts else (-1, 0)
        if covered and covered >= MIN_COVER * patch.size:
            yield row, position, SceneObject(int(batch.colour[row, cell]), int(batch.shape[row, cell]))


def _states_by_depth(
    model: PreTrainedModel, inputs: dict[str, Tensor], tokens: TokenMap, positions: Bool[Tensor, "batch positions"]
) -> list[Float[Tensor, "patches width"]]:
    """Run the model, and return the states at some positions after 0, 1, ... all layers."""
    embeddings: list[Tensor] = []

    def record_embeddings(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embeddings.append(input_states(args, kwargs)[positions])

    first_layer = decoder_layers(find_decoder(model))[0]
    handle = first_layer.register_forward_pre_hook(record_embeddings, with_kwargs=True)
    try:
        with record_states(model, tokens, positions) as states:
            model(**inputs)
    finally:
        handle.remove()
    return [*embeddings, *(states[layer] for layer in states.layers)]


def _score(words: Sequence[str], objects: Sequence[SceneObject], images: Sequence[int], count: int) -> dict[str, Any]:
    """Return how many patches of each image are named right, and the share that is right by chance."""
    right: Counter[int] = Counter()
    for word, item, image in zip(words, objects, images, strict=True):
        right[image] += word in item.words
    word_counts = Counter(words)
    by_chance = sum(number * word_counts[word] for item, number in Counter(objects).items() for word in item.words)
    return {
        "right": [right[image] for image in range(count)],
        "chance": round(by_chance / len(objects) ** 2, _DIGITS),
    }
