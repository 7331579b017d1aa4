"""Rows of inputs for pruning tests, and checks that every method has to pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from probes.tokens.token_map import TokenMap
from tests.tiny_models import IMAGE_TOKEN

# (text before, visual tokens, text after): many visual tokens, few, none, no question after the image
TEXTS = [(3, 20, 6), (0, 5, 9), (0, 0, 7), (2, 13, 0), (1, 1, 4)]
Method = Callable[[Any, TokenMap], AbstractContextManager[Any]]


def unpadded_row(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """Return one row of the inputs without its padding."""
    real = inputs["attention_mask"][row].bool()
    return {"input_ids": inputs["input_ids"][row : row + 1, real], "attention_mask": real[real][None].long()}


def embed(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return embeddings instead of ids, in which the n-th visual token of every row has a vector of its own.

    Visual tokens with the embedding of the image token would be equal, and ties would be decided by rounding.
    """
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    vision = inputs["input_ids"] == IMAGE_TOKEN
    vectors = torch.randn(64, embeddings.shape[-1], generator=torch.Generator().manual_seed(5)) * 0.2
    embeddings[vision] = vectors[(vision.cumsum(dim=1) - 1)[vision]]
    return {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}


def removed_in(model: Any, inputs: dict[str, Tensor], method: Method) -> list[Tensor]:
    """Return which positions each stage of a method removes in a forward call."""
    with torch.no_grad(), method(model, TokenMap.from_inputs(model, inputs)) as receipt:
        model(**embed(model, inputs))
    return [effect.chosen for effect in receipt]


def assert_rows_independent(model: Any, inputs: dict[str, Tensor], method: Method) -> None:
    """Check that a row of a padded batch loses the tokens that it loses alone, without padding."""
    whole = removed_in(model, inputs, method)
    for row, (_, visual, _) in enumerate(TEXTS):
        real = inputs["attention_mask"][row].bool()
        if visual:
            for together, alone in zip(whole, removed_in(model, unpadded_row(inputs, row), method), strict=True):
                assert torch.equal(together[row, real], alone[0]), f"row {row}"
