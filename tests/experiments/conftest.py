"""Fixtures that several tests of experiments share: data, models and configurations."""

import json
import os

import numpy as np
import pytest
from hydra import compose, initialize_config_module

from experiments.config import registry as configuration
from experiments.data.samples import single_questions
from experiments.data.scenes import IMAGE_SIZE
from experiments.data.shapes import load_shapes
from experiments.errors import FULL_ERROR_VARIABLE
from experiments.models import scratch
from tests.experiments.sample_records import (  # noqa: F401  fixtures
    make_results,
    probed,
    records,
    spec,
    table_records,
    write_records,
)


def required_overrides(kind: str, name: str) -> list[str]:
    """Return overrides for the paths of models and data that a configuration leaves to its user."""
    photos = ["data.photos=x"]
    needs = {
        "checkpoint": ["model.path=x"],
        "llava_json": ["data.path=x", "data.images=x"],
        "photos": photos,
        "lmms": ["data.tasks=[x]"],
    }
    return photos if kind == "experiment" and name.startswith("smol_") else needs.get(name, [])


@pytest.fixture(autouse=True)
def one_line_errors():
    """Let processes that a test starts report errors in one line, whichever test called the command line before."""
    os.environ.pop(FULL_ERROR_VARIABLE, None)
    yield
    os.environ.pop(FULL_ERROR_VARIABLE, None)


@pytest.fixture
def compose_config():
    """Compose a configuration from overrides, as the command line does."""
    configuration.register_configs()
    with initialize_config_module("conf", version_base="1.3"):
        yield lambda *overrides: compose("config", list(overrides))


@pytest.fixture(scope="session")
def shapes_split():
    """A training split of eight scenes with six questions each."""
    return load_shapes("train", 8)


@pytest.fixture(scope="session")
def processor(shapes_split):
    """The processor of the tiny LLaVA, with a vocabulary of the eight scenes."""
    return scratch.build_processor(scratch.train_tokenizer(shapes_split.samples, 384), IMAGE_SIZE, patch=16)


@pytest.fixture
def llava(processor):
    """A tiny LLaVA with random weights: 9 visual tokens, 2 layers."""
    import torch

    torch.manual_seed(0)
    return scratch.build_llava(processor.tokenizer, IMAGE_SIZE, patch=16, width=32, layers=2).eval()


@pytest.fixture
def deep_llava(processor):
    """A tiny LLaVA with random weights, 9 visual tokens, 4 layers, and attention far from uniform."""
    import torch

    torch.manual_seed(0)
    model = scratch.build_llava(processor.tokenizer, IMAGE_SIZE, patch=16, width=32, layers=4).eval()
    for name, parameter in model.model.language_model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.data *= 10
    return model


@pytest.fixture
def questions(shapes_split, processor):
    """Three encoded questions about the first scene, in batches of one."""
    import torch

    from experiments.evaluation.questions import EncodedQuestions

    return EncodedQuestions(list(single_questions(shapes_split.samples))[:3], processor, 1, torch.device("cpu"))


@pytest.fixture
def photos(tmp_path):
    """A folder of 12 training and 12 test photographs, each of one uniform colour that no other has."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for split, shift in (("train", 0), ("test", 10)):
        images = np.repeat(np.arange(12, dtype=np.uint8) * 20 + shift, 32 * 32 * 3).reshape(12, 32, 32, 3)
        np.savez(folder / f"{split}.npz", images=images, labels=np.arange(12) % 3)
    (folder / "classes.json").write_text(json.dumps(["airplane", "cat", "dog"]))
    return folder
