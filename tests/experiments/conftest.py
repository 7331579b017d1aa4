"""Small things that several tests of experiments build on."""

import pytest
from hydra import compose, initialize_config_module

from experiments import config as configuration
from experiments import tiny
from experiments.data.scenes import SIDE
from experiments.data.shapes import load_shapes


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
    return tiny.processor(tiny.tokenizer(few.samples, 384), SIDE, patch=16)


@pytest.fixture
def llava(processor):
    """A LLaVA of the tiny shape with nothing learned: 9 visual tokens, 2 layers."""
    import torch

    torch.manual_seed(0)
    return tiny.llava(processor.tokenizer, SIDE, patch=16, width=32, layers=2).eval()
