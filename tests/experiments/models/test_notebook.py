"""Tests of model and data loading for notebooks."""

import json

import pytest
import torch
from PIL import Image

from experiments.models.notebook import load_batch, load_checkpoint


@pytest.fixture(scope="module")
def model_and_processor():
    return load_checkpoint("asset:tiny")


def test_load_batch_shapes_gives_one_question_per_image(model_and_processor):
    samples, inputs = load_batch(*model_and_processor, 6)
    assert [len(sample.questions) for sample in samples] == [1] * 6
    assert inputs["input_ids"].shape == inputs["labels"].shape
    assert inputs["pixel_values"].shape[0] == 6
    assert (inputs["attention_mask"][:, -1] == 1).all()  # padded on the left
    labelled = inputs["labels"] != -100
    assert torch.equal(inputs["labels"][labelled], inputs["input_ids"][labelled])


def test_load_batch_llava_json_reads_the_given_images(model_and_processor, tmp_path):
    Image.new("RGB", (48, 48), "red").save(tmp_path / "red.png")
    turns = [{"from": "human", "value": "<image>\nhow many shapes are there"}, {"from": "gpt", "value": "two"}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "1", "image": "red.png", "conversations": turns}]))
    (sample,), inputs = load_batch(*model_and_processor, 1, str(tmp_path / "data.json"), str(tmp_path))
    assert sample.answers == ["two"]
    assert len(inputs["input_ids"]) == 1


def test_load_batch_path_without_images_raises(model_and_processor):
    with pytest.raises(ValueError, match=r"path='data\.json'.*images=None"):
        load_batch(*model_and_processor, 1, "data.json")
