"""A second tree of modules over the same weights."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def twin(model: Model) -> Model:
    """A copy of the modules and the configuration of `model` that shares its parameters and buffers.

    What rebuilds a model in place, as TransformerLens does (it replaces modules, and so the keys of the state dict),
    may have the twin, and the model stays whole. No weight is copied; one that is written is written for both.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
