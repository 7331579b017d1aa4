"""The share of visual tokens that each layer works on, for methods that drop tokens inside the language model."""

from __future__ import annotations

import torch

from experiments.config.schema import ReductionConfig
from probes.pruning import count_kept_tokens


def reduction_layers(config: ReductionConfig, depth: int) -> list[int]:
    """Return the layers at which a reduction starts to run on fewer tokens.

    Args:
        config: Method and layers. With `reference_depth`, layers are scaled from that depth to `depth`, to the nearest
            (halves up), at least 1, and each later than the one before.
        depth: Layers of the language model.

    Raises:
        ValueError: If the layers do not ascend, or are outside the model.
    """
    configured, reference = list(config.layers), config.reference_depth
    layers = list(configured)
    if reference:
        layers = []
        for layer in configured:
            after = layers[-1] + 1 if layers else 1
            layers.append(max(after, (2 * layer * depth + reference) // (2 * reference)))
    # methods that rank tokens need an earlier layer
    lowest = 0 if config.name in ("vtw", "random_drop") else 1
    if sorted(set(layers)) != layers or not all(lowest <= layer < depth for layer in layers):
        scaled = f" of {reference} are {layers} in a model" if reference else " in a model"
        raise ValueError(
            f"reduction.layers: {configured}{scaled} of {depth} layers; {config.name} needs ascending layers from "
            f"{lowest} to {depth - 1}"
        )
    return layers


def reduction_token_shares(config: ReductionConfig, depth: int, visual_tokens: int) -> list[float]:
    """Return the share of a prompt's visual tokens that each layer works on, with a reduction.

    Args:
        config: Method, layers and share of kept tokens.
        depth: Layers of the language model.
        visual_tokens: Visual tokens of the prompt.

    Returns:
        A share from 0 to 1 for each of `depth` layers.

    Raises:
        ValueError: As `reduction_layers`.
    """
    shares = [1.0] * depth
    if config.name != "none":
        for stage, start in enumerate(reduction_layers(config, depth), 1):
            left = int(count_kept_tokens(torch.tensor(visual_tokens), config.keep**stage))
            shares[start:] = [left / visual_tokens] * (depth - start)
    return shares


def inside_prefusion_token_shares(layers: int, depth: int, visual_tokens: int, compressed: int) -> list[float]:
    """Return the share of a prompt's visual tokens that each layer works on, with pre-fusion inside the language model.

    Args:
        layers: The first layers, which work on patches and compressed tokens. Later layers get compressed tokens alone.
        depth: Layers of the language model.
        visual_tokens: Visual tokens of the prompt: patches and compressed tokens.
        compressed: The compressed tokens among them.

    Returns:
        A share from 0 to 1 for each of `depth` layers.

    Raises:
        ValueError: If no layer is left without patches.
    """
    if not 1 <= layers < depth:
        raise ValueError(
            f"prefusion.layers: {layers} inside a language model of {depth} layers; use 1 to {depth - 1}, so that some "
            "layers get no patches"
        )
    return [1.0] * layers + [compressed / visual_tokens] * (depth - layers)
