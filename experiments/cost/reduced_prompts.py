"""Costs of prompts whose visual tokens leave the language model on the way, from a configuration alone."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from typing import Any

from omegaconf import OmegaConf

from experiments.config.schema import REDUCTIONS, ReductionConfig
from experiments.cost.estimate import Estimate, Geometry, Prompt
from experiments.models.reduction_schedule import visual_by_layer, visual_inside
from llava_mini import LlavaMiniConfig


def published(name: str) -> ReductionConfig:
    """A method as conf/reduction/ has it.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in REDUCTIONS:
        raise ValueError(f"reduction: no {name!r}; use {', '.join(REDUCTIONS)}")
    text = files("conf").joinpath("reduction", f"{name}.yaml").read_text()
    settings: Any = OmegaConf.to_container(OmegaConf.create(text))
    del settings["defaults"]
    return ReductionConfig(**settings)


def reduced(geometry: Geometry, prompt: Prompt, reduction: ReductionConfig) -> Estimate:
    """The cost of a prompt under a reduction.

    Raises:
        ValueError: If the language model lacks the layers that it names.
    """
    shares = visual_by_layer(reduction, geometry.layers, geometry(prompt).visual_tokens)
    return geometry(replace(prompt, visual_by_layer=shares))


def fused_inside(geometry: Geometry, prompt: Prompt, layers: int) -> Estimate:
    """The cost of a prompt to a LLaVA-Mini with `keep_patches`, of whose language model the first `layers` see patches.

    Raises:
        ValueError: If it is another model, or no layer is left without patches.
    """
    config = geometry.config
    if not (isinstance(config, LlavaMiniConfig) and config.keep_patches):
        raise ValueError("pre-fusion within the language model needs a LLaVA-Mini with keep_patches")
    compressed = config.compressor_size**2 * prompt.frames
    shares = visual_inside(layers, geometry.layers, geometry(prompt).visual_tokens, compressed)
    return geometry(replace(prompt, visual_by_layer=shares))
