"""Small things that several tests of experiments build on."""

import json

import numpy as np
import pytest
from hydra import compose, initialize_config_module

from experiments.config import registry as configuration
from experiments.data.samples import single_questions
from experiments.data.scenes import SIDE
from experiments.data.shapes import load_shapes
from experiments.models import scratch
from tests.experiments.sample_records import (  # noqa: F401  fixtures
    definition,
    make_results,
    probed,
    records,
    table_records,
    write_records,
)


def required(kind: str, name: str) -> list[str]:
    """What an option leaves to its user, who alone knows where models and data are."""
    photos = ["data.photos=x"]
    needs = {"checkpoint": ["model.path=x"], "llava_json": ["data.path=x", "data.images=x"], "photos": photos}
    return photos if kind == "experiment" and name.startswith("smol_") else needs.get(name, [])


@pytest.fixture
def composed():
    """A configuration from overrides, as the command line composes it."""
    configuration.register()
    with initialize_config_module("conf", version_base="1.3"):
        yield lambda *overrides: compose("config", list(overrides))


@pytest.fixture(scope="session")
def few():
    """Eight scenes with six questions each."""
    return load_shapes("train", 8)


@pytest.fixture(scope="session")
def processor(few):
    return scratch.processor(scratch.tokenizer(few.samples, 384), SIDE, patch=16)


@pytest.fixture
def llava(processor):
    """A LLaVA of the tiny shape with nothing learned: 9 visual tokens, 2 layers."""
    import torch

    torch.manual_seed(0)
    return scratch.llava(processor.tokenizer, SIDE, patch=16, width=32, layers=2).eval()


@pytest.fixture
def deep(processor):
    """Four layers over nine visual tokens, with attention that is far from uniform."""
    import torch

    torch.manual_seed(0)
    model = scratch.llava(processor.tokenizer, SIDE, patch=16, width=32, layers=4).eval()
    for name, parameter in model.model.language_model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.data *= 10
    return model


@pytest.fixture
def questions(few, processor):
    """Three of the first scene, one at a time."""
    import torch

    from experiments.evaluation.questions import Questions

    return Questions(list(single_questions(few.samples))[:3], processor, 1, torch.device("cpu"))


@pytest.fixture
def photos(tmp_path):
    """A folder of twelve photographs for training and twelve for testing, each of one even colour that no other has."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for split, shift in (("train", 0), ("test", 10)):
        images = np.repeat(np.arange(12, dtype=np.uint8) * 20 + shift, 32 * 32 * 3).reshape(12, 32, 32, 3)
        np.savez(folder / f"{split}.npz", images=images, labels=np.arange(12) % 3)
    (folder / "classes.json").write_text(json.dumps(["airplane", "cat", "dog"]))
    return folder
