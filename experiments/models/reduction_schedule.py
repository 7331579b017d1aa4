"""TODO"""

from __future__ import annotations

import torch

from experiments.config.schema import ReductionConfig
from probes.pruning import kept_tokens


def first_layers(config: ReductionConfig, depth: int) -> list[int]:
    """The first layers of a language model of `depth` that run on fewer tokens: `config.layers`, scaled from
    `config.of` layers to `depth`, to the nearest (halves up) and at least 1.

    Raises:
        ValueError: If they do not ascend, or do not lie in the model.
    """
    named, of = list(config.layers), config.of
    layers = [max(1, (2 * layer * depth + of) // (2 * of)) for layer in named] if of else named
    least = 0 if config.name == "vtw" else 1  # those that rank tokens need a layer to look at
    if sorted(set(layers)) != layers or not all(least <= layer < depth for layer in layers):
        scaled = f" of {of} are {layers} in a model of {depth} layers" if of else f" in a model of {depth} layers"
        raise ValueError(
            f"reduction.layers: {named}{scaled}; {config.name} needs ascending ones, {least} to {depth - 1}"
        )
    return layers


def visual_by_layer(config: ReductionConfig, depth: int, visual: int) -> list[float]:
    """The share of a prompt's `visual` tokens that each of `depth` layers works on.

    Raises:
        ValueError: As `first_layers`.
    """
    shares = [1.0] * depth
    if config.name != "none":
        for stage, start in enumerate(first_layers(config, depth), 1):
            shares[start:] = [int(kept_tokens(torch.tensor(visual), config.keep**stage)) / visual] * (depth - start)
    return shares


def visual_inside(layers: int, depth: int, visual: int, compressed: int) -> list[float]:
    """The same where the first `layers` see `visual` tokens, patches and compressed ones, and the others `compressed`.

    Raises:
        ValueError: If no layer is left without patches.
    """
    if not 1 <= layers < depth:
        raise ValueError(
            f"prefusion.layers: {layers} inside a language model of {depth} layers; use 1 to {depth - 1}, so that some "
            "see no patches"
        )
    return [1.0] * layers + [compressed / visual] * (depth - layers)
