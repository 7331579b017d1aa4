"""Rows of text inputs for the tests of every method."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from tests.probes.pruning.rows import TEXTS

Inputs = dict[str, Tensor]


@pytest.fixture
def rows(make_rows: Callable[..., Inputs]) -> Callable[[str], Inputs]:
    """Factory of rows padded on a side, without pixels."""

    def make(side: str) -> Inputs:
        inputs = make_rows(TEXTS, side)
        return {name: values for name, values in inputs.items() if name != "pixel_values"}

    return make
