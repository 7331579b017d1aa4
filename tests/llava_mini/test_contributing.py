"""Test the compressor that CONTRIBUTING.md shows as an example."""

import re
from pathlib import Path

import pytest
import torch

from llava_mini import LlavaMiniConfig
from llava_mini.compressors import COMPRESSORS

TEXT = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text()


@pytest.fixture
def example():
    """Run the example's code, and return the name that it registers."""
    before = set(COMPRESSORS)
    source = re.search(r"```python\n# llava_mini/compressors/first.py\n(.*?)```", TEXT, re.DOTALL).group(1)
    exec(compile(source, "first.py", "exec"), {"__package__": "llava_mini.compressors", "__name__": "first"})
    (name,) = set(COMPRESSORS) - before
    yield name
    del COMPRESSORS[name]


def test_example_compressor_returns_first_patches(example):
    features = torch.randn(2, 9, 8)
    tokens, weights = COMPRESSORS[example](LlavaMiniConfig(compressor=example, compressor_size=2))(features)
    assert torch.equal(tokens, features[:, :4])
    torch.testing.assert_close(weights @ features, tokens)
    assert weights.sum(-1).eq(1).all()


@pytest.mark.parametrize(("patches", "message"), [(10, "got 10"), (1, "1 x 1 grid")])
def test_example_compressor_without_a_large_enough_square_of_patches_raises(example, patches, message):
    compressor = COMPRESSORS[example](LlavaMiniConfig(compressor=example, compressor_size=2))
    with pytest.raises(ValueError, match=message):
        compressor(torch.randn(1, patches, 8))
