"""Checkpoint folders of users: damaged files, and processors that older versions of transformers saved."""

from __future__ import annotations

import json
import shutil

import pytest

from experiments.files import ASSETS
from experiments.models.build import load_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    return shutil.copytree(ASSETS / "tiny", tmp_path / "tiny")


@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["", "null", "[1]", "{"])
def test_load_checkpoint_of_a_damaged_file_names_it(checkpoint, file, content):
    (checkpoint / file).write_text(content)
    with pytest.raises(ValueError, match=file) as caught:
        load_checkpoint(str(checkpoint))
    assert "\n" not in str(caught.value)


def test_load_checkpoint_of_an_older_processor_reads_the_config(checkpoint):
    fields = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
    file = checkpoint / "processor_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in values.items() if key not in fields}))
    _, processor = load_checkpoint(str(checkpoint))
    assert [getattr(processor, name) for name in fields] == [values[name] for name in fields]
