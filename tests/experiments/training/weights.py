"""Weights of a model before and after training."""

import torch


def copy_weights(model) -> dict[str, torch.Tensor]:
    """Return a copy of the model's weights."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed_parameters(model, before: dict[str, torch.Tensor]) -> set[str]:
    """Return the names of parameters that differ from earlier weights."""
    return {name for name, value in model.named_parameters() if not torch.equal(before[name], value)}
