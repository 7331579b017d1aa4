from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from probes.hooks.decoder import as_indices, find_decoder, select_layers


@pytest.mark.parametrize(
    "given", [[2, 1], (2, 1), torch.tensor([2, 1]), np.array([2, 1])], ids=["list", "tuple", "torch", "numpy"]
)
def test_as_indices_returns_plain_integers(given: Any) -> None:
    assert as_indices("layers", given) == [2, 1]
    assert {type(number) for number in as_indices("layers", given)} == {int}


@pytest.mark.parametrize(
    "given",
    [[False, True], torch.tensor([False, True]), np.array([False, True]), [0.5], torch.tensor([0.5]), "ab", ["a"], 3],
)
def test_as_indices_of_anything_else_raises_type_error(given: Any) -> None:
    """A mask of layers would be read as layers 0 and 1."""
    with pytest.raises(TypeError, match=r"layers: .*(True|False|0.5|'ab?'|3)"):
        as_indices("layers", given)


def test_select_layers_of_tensor_with_repeats_returns_each_layer_once(make_llava: Any) -> None:
    assert select_layers(find_decoder(make_llava("sdpa")), torch.tensor([1, 1, 0])) == (0, 1)
