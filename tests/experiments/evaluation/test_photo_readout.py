"""The read-out of photographs from vision features, compared with loops over patches."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from experiments.data.photos import load_photos, photo_grids
from experiments.data.samples import single_questions
from experiments.evaluation.photo_readout import measure_photo_readout
from experiments.evaluation.questions import EncodedQuestions
from llava_mini import LlavaMiniForConditionalGeneration, LlavaMiniProcessor
from probes.readouts.linear_probe import linear_readout

CPU = torch.device("cpu")


@pytest.fixture
def noisy_photos(tmp_path):
    """A folder of photographs of three classes, whose pixels differ in colour by class."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        labels = np.arange(60) % 3
        images = rng.integers(0, 200, (60, 16, 16, 3)) + 55 * np.eye(3, dtype=int)[labels][:, None, None]
        np.savez(tmp_path / f"{split}.npz", images=images.astype(np.uint8), labels=labels)
    (tmp_path / "classes.json").write_text(json.dumps(["airplane", "cat", "dog"]))
    return str(tmp_path)


def questions_of(split, processor) -> EncodedQuestions:
    return EncodedQuestions(list(single_questions(split.samples)), processor, 4, CPU)


def test_measure_photo_readout_equals_a_loop_over_patches(llava, processor, noisy_photos):
    """Images of 3 x 3 patches: a 3 x 3 grid has a photograph a patch; a 2 x 2 grid leaves the patches of its middle cross."""
    split = load_photos(noisy_photos, "test", 20, 0, ["2x2", "3x3"], 3, 16, captions=False)
    part = measure_photo_readout(llava, questions_of(split, processor), split.samples)
    assert part is not None
    assert [grid["grid_size"] for grid in part["grids"]] == [2, 3]
    cells = {2: (0, 2, 6, 8), 3: range(9)}  # in a 2 x 2 grid photographs have one patch each, in the corners
    for grid in part["grids"]:
        states, names, pictures = [], [], []
        for sample, entry in zip(split.samples, photo_grids(split.samples), strict=True):
            samples, index = entry
            if samples.grid_size != grid["grid_size"]:
                continue
            pixels = processor.image_processor(sample.loaders[0](), return_tensors="pt").pixel_values
            with torch.no_grad():
                tower = llava.model.vision_tower(pixels, output_hidden_states=True)
            layer = tower.hidden_states[llava.config.vision_feature_layer][0, 1:]
            states += [layer[cell] for cell in cells[grid["grid_size"]]]
            names += samples.class_names(index)
            pictures += samples.photo_indices[index].tolist()
        assert len(set(pictures)) < len(pictures)  # photographs recur in other images
        expected = linear_readout(torch.stack(states)[None], names, pictures=pictures)
        assert grid["photographs"] == len(names)
        assert grid["correct"] == "".join(str(int(right)) for right in expected.correct[0])


def test_patches_of_a_grid_are_those_that_its_photographs_cover(photos):
    """A grid of white photographs is grey elsewhere."""
    for part, side in (("2x2", 4), ("2x2", 5), ("3x3", 8)):
        (grid, index), *_ = photo_grids(load_photos(str(photos), "test", 1, 0, [part], side, 4, False).samples)
        grid.photos = grid.photos._replace(images=np.full_like(grid.photos.images, 255))
        image = np.asarray(grid.render(index))[::4, ::4, 0]  # a pixel of each patch
        covers = grid.patches()
        assert covers.sum(0).max() == 1
        assert (covers.any(0) == (image == 255).ravel()).all()


def test_measure_photo_readout_without_enough_grids_is_none(llava, processor, shapes_split, noisy_photos):
    scenes = list(single_questions(shapes_split.samples))
    questions = EncodedQuestions(scenes, processor, 4, CPU)
    assert measure_photo_readout(llava, questions, shapes_split.samples) is None
    single = load_photos(noisy_photos, "test", 8, 0, ["one"], 3, 16, captions=False)
    assert measure_photo_readout(llava, questions_of(single, processor), single.samples) is None
    few = load_photos(noisy_photos, "test", 1, 0, ["2x2"], 3, 16, captions=False)
    assert (
        measure_photo_readout(llava, questions_of(few, processor), few.samples) is None
    )  # fewer photographs than folds


def test_measure_photo_readout_of_a_model_of_another_family_is_none(processor, noisy_photos):
    split = load_photos(noisy_photos, "test", 8, 0, ["3x3"], 3, 16, captions=False)
    assert measure_photo_readout(torch.nn.Identity(), questions_of(split, processor), split.samples) is None


def test_measure_photo_readout_of_a_llava_mini_is_that_of_its_llava(llava, processor, noisy_photos):
    """Both have the same vision tower; what is compressed comes after it."""
    split = load_photos(noisy_photos, "test", 8, 0, ["3x3"], 3, 16, captions=False)
    mini = LlavaMiniForConditionalGeneration.from_llava(llava, compressor_size=2)
    parts = [measure_photo_readout(model, questions_of(split, processor), split.samples) for model in (llava, mini)]
    assert parts[0] == parts[1] is not None


def test_measure_photo_readout_of_images_in_tiles_is_none(llava, processor, noisy_photos):
    """The projector then reads several crops an image, whose patches are not those of the whole grid."""
    split = load_photos(noisy_photos, "test", 8, 0, ["3x3"], 3, 16, captions=False)
    mini = LlavaMiniForConditionalGeneration.from_llava(llava, compressor_size=2)
    tiled = LlavaMiniProcessor.from_llava(processor, mini.config, tiles=2)
    assert measure_photo_readout(mini, questions_of(split, tiled), split.samples) is None
