"""Cost of prompts whose visual tokens leave the language model between its layers."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from typing import Any

from omegaconf import OmegaConf

from experiments.config.schema import REDUCTIONS, ReductionConfig
from experiments.cost.estimate import CostEstimate, CostModel, Prompt
from experiments.models.reduction_schedule import inside_prefusion_token_shares, reduction_token_shares
from llava_mini import LlavaMiniConfig


def published_reduction(name: str) -> ReductionConfig:
    """Return a reduction method with its published settings, as conf/reduction/ holds them.

    Args:
        name: A name of `REDUCTIONS`.

    Raises:
        ValueError: If there is no such method.
    """
    if name not in REDUCTIONS:
        raise ValueError(f"reduction: no {name!r}; use {', '.join(REDUCTIONS)}")
    text = files("conf").joinpath("reduction", f"{name}.yaml").read_text()
    settings: Any = OmegaConf.to_container(OmegaConf.create(text))
    del settings["defaults"]
    return ReductionConfig(**settings)


def estimate_with_reduction(cost_model: CostModel, prompt: Prompt, reduction: ReductionConfig) -> CostEstimate:
    """Estimate the cost of a prompt under a reduction method.

    Raises:
        ValueError: If the language model lacks the layers that the method names.
    """
    shares = reduction_token_shares(reduction, cost_model.layers, cost_model(prompt).visual_tokens)
    return cost_model(replace(prompt, visual_by_layer=shares))


def estimate_with_inside_prefusion(cost_model: CostModel, prompt: Prompt, layers: int) -> CostEstimate:
    """Estimate the cost of a prompt for a LLaVA-Mini with `keep_patches`.

    Args:
        cost_model: The costs per token of that LLaVA-Mini.
        prompt: The sizes of the prompt.
        layers: The number of first layers of the language model that process the patches.

    Raises:
        ValueError: If the model has no `keep_patches`, or no layer remains without patches.
    """
    config = cost_model.config
    if not (isinstance(config, LlavaMiniConfig) and config.keep_patches):
        raise ValueError("pre-fusion inside the language model needs a LLaVA-Mini with keep_patches")
    tokens = config.compressor_size**2 * prompt.frames
    shares = inside_prefusion_token_shares(layers, cost_model.layers, cost_model(prompt).visual_tokens, tokens)
    return cost_model(replace(prompt, visual_by_layer=shares))
