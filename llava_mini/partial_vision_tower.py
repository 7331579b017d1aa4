"""Run of a vision tower up to the deepest hidden state that the model reads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Encoder layers whose outputs are transformers' hidden states, without a norm between them.
ENCODER_LAYERS = ("CLIPEncoderLayer", "SiglipEncoderLayer", "Dinov2Layer")
# Norms that vision towers apply to the last layer's output. No hidden state depends on them.
FINAL_NORMS = ("post_layernorm", "layernorm")


class StateStore(nn.Module):
    """Keep the hidden states that pass, and return them unchanged."""

    states: Tensor

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.states = hidden_states
        return hidden_states


def hidden_states_at(
    vision_tower: nn.Module, indices: Sequence[int], pixel_values: Tensor, **options: Any
) -> list[Float[Tensor, "crops positions width"]]:
    """Compute hidden states of a vision tower, and nothing that they do not depend on.

    CLIP, SigLIP and DINOv2 run up to the deepest index: without later layers, final norm and pooling head. Others run as
    a whole, and so do these if a forward hook or a wrapper must see the rest.

    Args:
        vision_tower: A vision tower of transformers.
        indices: Indices into transformers' `hidden_states`, which start with the embeddings; negative from the end.
        pixel_values: Pixels of shape (crops, channels, height, width).
        options: Other arguments of the vision tower.

    Returns:
        One tensor for each index.

    Example:
        >>> from llava_mini.partial_vision_tower import hidden_states_at
        >>> pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
        >>> tower = model.model.vision_tower
        >>> torch.equal(
        ...     hidden_states_at(tower, [1], pixels)[0], tower(pixels, output_hidden_states=True).hidden_states[1]
        ... )
        True
    """
    name = _find_layers(vision_tower)
    if name is not None:
        layers: Any = vision_tower.get_submodule(name)
        depths = [index % (len(layers) + 1) for index in indices]
        if not _is_observed(vision_tower, name, max(depths)):
            stores = {depth: StateStore() for depth in depths}
            _copy_with_stores(vision_tower, name, stores)(pixel_values, return_dict=True, **options)
            return [stores[depth].states for depth in depths]
    output = vision_tower(pixel_values, output_hidden_states=True, return_dict=True, **options)
    return [output.hidden_states[index] for index in indices]


def _find_layers(vision_tower: nn.Module) -> str | None:
    """Return the name of the list of encoder layers; None for an unknown vision tower."""
    for name, module in vision_tower.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and type(module[0]).__name__ in ENCODER_LAYERS:
            return name
    return None


def _copy_with_stores(vision_tower: nn.Module, name: str, stores: dict[int, StateStore]) -> nn.Module:
    """Copy a vision tower with the same parameters, ending at its deepest store.

    Copying the few modules around the layers leaves the vision tower itself unchanged, so threads can share it.

    Args:
        vision_tower: The vision tower.
        name: Name of its list of layers.
        stores: Stores by the number of layers ahead of them.
    """
    layers: Any = vision_tower.get_submodule(name)
    *path, last = name.split(".")
    module = copied = _shallow_copy(vision_tower)
    for part in path:
        # Skip what follows the encoder.
        module._modules |= {norm: nn.Identity() for norm in FINAL_NORMS if norm in module._modules}
        if "use_head" in vars(module):
            vars(module)["use_head"] = False
        module._modules[part] = _shallow_copy(module.get_submodule(part))
        module = module.get_submodule(part)
    kept: list[nn.Module] = []
    for depth in range(max(stores) + 1):
        kept += [layers[depth - 1]] if depth else []
        kept += [stores[depth]] if depth in stores else []
    module._modules[last] = nn.ModuleList(kept)
    return copied


def _shallow_copy(module: nn.Module) -> nn.Module:
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied


def _is_observed(vision_tower: nn.Module, name: str, depth: int) -> bool:
    """Return whether something outside must see modules that a partial run skips or replaces by copies.

    Args:
        vision_tower: The vision tower.
        name: Name of its list of layers.
        depth: Number of layers to run.
    """
    config: Any = vision_tower.config
    if torch.compiler.is_compiling() or config.output_hidden_states or config.output_attentions:
        return True
    layers: Any = vision_tower.get_submodule(name)
    run_as_usual = {module for layer in layers[:depth] for module in layer.modules()}
    others = [module for module in vision_tower.modules() if module not in run_as_usual]
    # Wrappers that move weights between devices replace `forward`.
    return any("forward" in vars(module) or module._forward_pre_hooks or _has_hooks(module) for module in others)


def _has_hooks(module: nn.Module) -> bool:
    """Return whether a module has forward hooks other than those of transformers, which only a flag activates."""
    recorder = "transformers.utils.output_capturing"
    return any(getattr(hook, "__module__", None) != recorder for hook in module._forward_hooks.values())


__all__ = ["hidden_states_at"]
