"""Words of patches against loops over the model's own hidden states, on planted and on random models."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from experiments.data.samples import OneQuestionPerImage
from experiments.data.scenes import CELL_SIZE, COLOURS, GRID_SIZE, IMAGE_SIZE, SHAPES, draw_scenes
from experiments.data.shapes import ONE_PER_TYPE, ShapeSamples, load_shapes
from experiments.data.shapes_video import load_shapes_video
from experiments.evaluation.patch_words import description_corpus, measure_patch_words, object_cells, shape_samples
from experiments.evaluation.questions import EncodedQuestions
from experiments.models import scratch
from llava_mini import LlavaMiniForConditionalGeneration, LlavaMiniProcessor

encode_questions = partial(EncodedQuestions, device=torch.device("cpu"))
PATCH, PER_SIDE = 8, IMAGE_SIZE // 8  # pixels of a patch, patches per side


@pytest.fixture
def small_patches(processor):
    """The processor of the tiny LLaVA for patches that are smaller than a grid cell."""
    return scratch.build_processor(processor.tokenizer, IMAGE_SIZE, patch=PATCH)


@pytest.fixture
def make_llava(processor):
    """Return a function that builds a LLaVA with random weights, whose attention may be far from uniform."""

    def make(seed: int = 0, layers: int = 2, sharpness: int = 1):
        torch.manual_seed(seed)
        model = scratch.build_llava(processor.tokenizer, IMAGE_SIZE, patch=PATCH, width=32, layers=layers).eval()
        for name, parameter in model.model.language_model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.data *= sharpness
        return model

    return make


def square_samples(count: int, seed: int = 0) -> ShapeSamples:
    """Return scenes that hold squares alone, whose pixels follow from their centre and radius."""
    scenes = draw_scenes("test", seed, count)
    squares = replace(scenes, shape=np.where(scenes.shape < 0, -1, SHAPES.index("square")))
    return ShapeSamples("test", squares, seed, ONE_PER_TYPE)


def measure(model, processor, samples: ShapeSamples, corpus: list[str], batch_size: int = 3):
    questions = encode_questions(list(OneQuestionPerImage(samples)), processor, batch_size)
    return measure_patch_words(model, processor, questions, samples.scenes, corpus)


def square_cells(samples: ShapeSamples, index: int) -> np.ndarray:
    """Return the grid cell of the square at each pixel, from the distance to its centre; -1 for the background."""
    scenes, cells = samples.scenes, np.full((IMAGE_SIZE, IMAGE_SIZE), -1)
    for cell in range(GRID_SIZE**2):
        if scenes.colour[index, cell] < 0:
            continue
        row, column = divmod(cell, GRID_SIZE)
        x, y = scenes.centre[index, cell]
        for i in range(CELL_SIZE):
            for j in range(CELL_SIZE):
                if max(abs(j + 0.5 - x), abs(i + 0.5 - y)) < 0.9 * scenes.radius[index, cell]:
                    cells[row * CELL_SIZE + i, column * CELL_SIZE + j] = cell
    return cells


def test_object_cells_are_the_pixels_of_the_squares() -> None:
    samples = square_samples(5)
    expected = np.stack([square_cells(samples, index) for index in range(5)])
    assert (object_cells(samples.scenes) == expected).mean() > 0.998  # noise decides a pixel on an edge


@torch.no_grad()
def test_measure_patch_words_equals_loops_over_hidden_states(make_llava, small_patches) -> None:
    model, processor = make_llava(layers=4, sharpness=10), small_patches
    samples, corpus = square_samples(3), description_corpus(load_shapes("train", 2).samples)
    part = measure(model, processor, samples, corpus)
    tokenizer, decoder = processor.tokenizer, model.get_decoder()
    inner: list[torch.Tensor] = []
    decoder.layers[-1].register_forward_hook(lambda layer, args, output: inner.append(output))
    depths = len(decoder.layers) + 1

    bank = []  # word and state, after 1, 2, ... all layers
    for text in corpus:
        encoding = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
        states = [*decoder(encoding["input_ids"], output_hidden_states=True).hidden_states[:-1], inner[-1]]
        word_at = {match.end(): match.group() for match in re.finditer(r"\w+", text)}
        for position, (_, stop) in enumerate(encoding["offset_mapping"][0].tolist()):
            if position and stop in word_at:
                bank += [(word_at[stop], states[depth][0, position]) for depth in range(1, depths)]
    logit_right, contextual_right = np.zeros((2, depths, 3), int)
    bank_states = torch.stack([state for _, state in bank])
    ties = np.zeros((depths, 3), int)
    patches, named = np.zeros(3, int), [(Counter(), Counter()) for _ in range(depths)]
    truths: Counter[str] = Counter()
    for index, sample in enumerate(OneQuestionPerImage(samples)):
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.questions[0]}]}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(text=text, images=sample.image, return_tensors="pt")
        output = model(**inputs, output_hidden_states=True)
        states = [*output.hidden_states[:-1], inner[-1]]
        cells = square_cells(samples, index)
        for patch in range(PER_SIDE**2):
            top, left = PATCH * (patch // PER_SIDE), PATCH * (patch % PER_SIDE)
            seen = Counter(c for c in cells[top : top + PATCH, left : left + PATCH].flat if c >= 0).most_common(1)
            if not seen or seen[0][1] < PATCH**2 / 4:
                continue
            patches[index] += 1
            colour = list(COLOURS)[samples.scenes.colour[index, seen[0][0]]]
            truths[colour] += 1
            right = {colour, "square", "squares"}
            for depth in range(depths):
                state = states[depth][0, (inputs["input_ids"][0] == model.config.image_token_id)][patch]
                logits = model.lm_head(decoder.norm(state))
                word = tokenizer.decode([int(logits.argmax())]).strip()
                similar = torch.cosine_similarity(state, bank_states)
                nearest = bank[int(similar.argmax())][0]
                # The lens keeps float16, which cannot tell words that are nearly equally similar.
                alike = {bank[entry][0] for entry in (similar > similar.max() - 1e-3).nonzero().flatten().tolist()}
                ties[depth, index] += len(alike) > 1
                logit_right[depth, index] += word in right
                contextual_right[depth, index] += nearest in right
                for counter, name in zip(named[depth], (word, nearest), strict=True):
                    counter[name] += 1
    assert patches.sum() > 4
    assert ties.sum() < patches.sum() * depths / 4
    assert part["patches"] == patches.tolist()
    assert (part["images"], len(part["depths"])) == (3, depths)
    for depth, entry in enumerate(part["depths"]):
        assert entry["logit"]["right"] == logit_right[depth].tolist()
        assert (abs(np.array(entry["contextual"]["right"]) - contextual_right[depth]) <= ties[depth]).all()
        for counter, lens in zip(named[depth], ("logit", "contextual"), strict=True):
            total = patches.sum()
            chance = (counter["square"] + counter["squares"]) / total
            chance += sum(counter[colour] * truths[colour] for colour in COLOURS) / total**2
            unsure = ties[depth].sum() / total if lens == "contextual" else 0
            assert entry[lens]["chance"] == pytest.approx(chance, abs=1e-5 + unsure)


@torch.no_grad()
def test_measure_patch_words_names_planted_colours_right(make_llava, small_patches) -> None:
    """Layers add nothing, and the projector maps a patch to the embedding of its colour's word, by least squares.

    So both lenses should name the colour wherever the least squares find it.
    """
    llava, processor = make_llava(), small_patches
    decoder, projector = llava.get_decoder(), llava.model.multi_modal_projector
    for layer in decoder.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    embeddings = torch.nn.functional.normalize(torch.randn(decoder.embed_tokens.weight.shape), dim=-1)
    decoder.embed_tokens.weight.copy_(embeddings)
    llava.lm_head.weight.copy_(embeddings)
    train = square_samples(150, seed=1)
    features: list[torch.Tensor] = []
    handle = projector.linear_2.register_forward_pre_hook(lambda module, args: features.append(args[0].flatten(0, 1)))
    targets, rows = [], []
    for index, sample in enumerate(OneQuestionPerImage(train)):
        llava(**processor(text="<image>", images=sample.image, return_tensors="pt"))
        cells = square_cells(train, index)
        for patch in range(PER_SIDE**2):
            top, left = PATCH * (patch // PER_SIDE), PATCH * (patch % PER_SIDE)
            seen = Counter(c for c in cells[top : top + PATCH, left : left + PATCH].flat if c >= 0).most_common(1)
            if seen and seen[0][1] >= PATCH**2 / 4:
                word = list(COLOURS)[train.scenes.colour[index, seen[0][0]]]
                targets.append(embeddings[processor.tokenizer(f" {word}")["input_ids"][-1]])
                rows.append(PER_SIDE**2 * index + patch)
    handle.remove()
    inputs = torch.cat(features)[rows].double()
    solution = torch.linalg.lstsq(
        torch.cat([inputs, torch.ones(len(rows), 1)], 1), torch.stack(targets).double()
    ).solution
    projector.linear_2.weight.copy_(solution[:-1].T)
    projector.linear_2.bias.copy_(solution[-1])

    part = measure(llava, processor, square_samples(20), description_corpus(load_shapes("train", 5).samples), 16)
    patches = sum(part["patches"])
    for entry in part["depths"]:
        for lens in ("logit", "contextual"):
            assert sum(entry[lens]["right"]) / patches > 0.8
            assert entry[lens]["chance"] < 0.35


def test_measure_patch_words_of_random_models_is_at_chance(make_llava, small_patches) -> None:
    """Which colour a random model calls a patch is arbitrary: the mean over models is that of words dealt at random."""
    samples, corpus = load_shapes("test", 12).samples, description_corpus(load_shapes("train", 5).samples)
    gains = []
    for seed in range(12):
        part = measure(make_llava(seed), small_patches, samples, corpus, 12)
        entry = part["depths"][1]["contextual"]
        gains.append(sum(entry["right"]) / sum(part["patches"]) - entry["chance"])
    assert abs(np.mean(gains)) < 3 * np.std(gains, ddof=1) / len(gains) ** 0.5 + 1e-9


def test_measure_patch_words_of_compressed_tokens_is_none(make_llava, small_patches) -> None:
    llava, processor = make_llava(), small_patches
    mini = LlavaMiniForConditionalGeneration.from_llava(llava, compressor="query", prefusion_layers=1).eval()
    mini_processor = LlavaMiniProcessor.from_llava(processor, mini.config)
    assert measure(mini, mini_processor, square_samples(2), ["row 1 red square"]) is None


def test_shape_samples_finds_scenes_behind_questions_alone() -> None:
    samples = load_shapes("test", 2).samples
    assert shape_samples(samples) is samples
    assert shape_samples(OneQuestionPerImage(samples)) is samples
    assert shape_samples(load_shapes_video("test", 1).samples) is None


def test_description_corpus_names_the_objects_of_the_first_scenes() -> None:
    samples = load_shapes("train", 3).samples
    corpus = description_corpus(samples, 2)
    assert len(corpus) == 2
    for index, text in enumerate(corpus):
        for content in filter(None, samples.cell_contents(index)):
            assert " ".join(content) in text
