"""Small things that several tests of experiments build on."""

import pytest

from experiments import tiny
from experiments.data.scenes import SIDE
from experiments.data.shapes import load_shapes


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
