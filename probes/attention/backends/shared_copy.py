"""A second tree of modules over the same weights."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from probes.unwrapping import unwrap_module

Model = TypeVar("Model", bound=nn.Module)


def copy_sharing_weights(model: Model) -> Model:
    """Copy the modules and the configuration of `model`, and share its parameters and buffers.

    Pass the copy to libraries that rebuild a model in place, and the model itself does not change. TransformerLens, for
    example, replaces modules, which changes the keys of the state dict.

    Args:
        model: Any module.

    Returns:
        The copy. No weight is copied, so writing to a weight changes it in both.

    Raises:
        ValueError: If `fully_shard` has sharded the model, which then cannot be copied.

    Example:
        >>> from probes.attention.backends.shared_copy import copy_sharing_weights
        >>> other = copy_sharing_weights(model)
        >>> other.get_decoder() is model.get_decoder(), other.lm_head.weight is model.lm_head.weight
        (False, True)
    """
    # `fully_shard` changes the classes of modules to subclasses with this method.
    if any(hasattr(module, "unshard") for module in model.modules()):
        raise ValueError(f"a {type(model).__name__} under fully_shard cannot be copied: use backend='native'")
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    duplicate = copy.deepcopy(model, shared)
    _remove_compilation(duplicate)
    return duplicate


def _remove_compilation(model: nn.Module) -> None:
    """Take what `torch.compile` made out of a copied model.

    A compiled `forward` would still call the module that it was compiled from.
    """
    for module in list(model.modules()):
        if hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable") and "_orig_mod" not in module._modules:
            del module.forward
        for name, child in module.named_children():
            module._modules[name] = unwrap_module(child)
