"""The setting of a method that fits a FLOPs budget, for tables at equal FLOPs."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from transformers import AutoConfig, LlavaConfig

from experiments.config.schema import REDUCTIONS
from experiments.cost.architectures import llava_config, llava_mini_config
from experiments.cost.estimate import CostModel, Prompt
from experiments.cost.reduced_prompts import estimate_with_reduction, published_reduction
from experiments.models.model_files import shipped_folder
from experiments.models.reduction_schedule import reduction_layers
from llava_mini.compressors import COMPRESSORS

_ARCHITECTURES_OF_PARTS = {("facebook/dinov2-small", "HuggingFaceTB/SmolLM2-135M-Instruct"): "smol"}


@dataclass(frozen=True)
class BudgetedSetting:
    """A setting of a method and its cost.

    Attributes:
        settings: Dotted settings of the configuration and their values.
        flops: FLOPs of the whole model for the prompt, attention products included ("full").
        share: The same as a share of LLaVA's.
    """

    settings: dict[str, Any]
    flops: float
    share: float


def budget_settings(model: Any, method: str, share: float, text_tokens: int) -> dict[str, Any]:
    """Return the settings that `most_costly_within` chooses for a cell's model.

    Args:
        model: The configuration of the model.
        method: The method, as in `budget.method`.
        share: The budget as a share of LLaVA's FLOPs.
        text_tokens: Text tokens of the prompt.

    Raises:
        ValueError: If the model's architecture is not known, or as `most_costly_within`.
    """
    sources = [shipped_folder(str(model.get(part) or "")) for part in ("path", "vision", "language")]
    return _cached_settings(model.name, *sources, model.grid, method, share, text_tokens)


def check_budget_alone(config: Any) -> None:
    """Check that a cell has nothing beside its budgeted method whose FLOPs the budget does not count.

    Args:
        config: The configuration of the cell, with a budget.

    Raises:
        ValueError: If it has pre-fusion layers, tiles, or a compressor and a reduction at once.
    """
    method = config.budget.method
    beside = "compressor.name" if method in REDUCTIONS else "reduction.name"
    for key, counted in (("prefusion.layers", 0), ("tiles", 1), (beside, "none")):
        if (found := OmegaConf.select(config, key)) != counted:
            raise ValueError(
                f"{key}: budget.method={method} counts FLOPs with {key}={counted}, found {found}; leave out one of the two"
            )


@functools.cache
def _cached_settings(
    name: str, path: str, vision: str, language: str, grid: int | None, method: str, share: float, text_tokens: int
) -> dict[str, Any]:
    if path and Path(path).is_dir():
        llava = llava_config(path)
    elif vision and language and Path(vision).is_dir() and Path(language).is_dir():
        vision_config = AutoConfig.from_pretrained(vision)
        llava = LlavaConfig(
            vision_config=getattr(vision_config, "vision_config", vision_config),
            text_config=AutoConfig.from_pretrained(language),
        )
    else:
        llava = llava_config(_ARCHITECTURES_OF_PARTS.get((vision, language), name))
    if grid is not None:
        llava.vision_config.image_size = grid * llava.vision_config.patch_size
    return most_costly_within(llava, method, share, text_tokens).settings


def most_costly_within(llava: LlavaConfig, method: str, share: float, text_tokens: int) -> BudgetedSetting:
    """Return the most costly setting of a method within a budget.

    What is chosen depends on the method: for `fastv` and `pyramid_drop` the share of tokens that stays, at the layers of
    conf/reduction; for `vtw` the layer; for a compressor its size C, without pre-fusion.

    Args:
        llava: The LLaVA.
        method: A compressor or a reduction.
        share: The budget as a share of LLaVA's FLOPs for one image and the text.
        text_tokens: Text tokens of the prompt.

    Raises:
        ValueError: If there is no such method, or each of its settings costs more.
    """
    model, prompt = CostModel(llava), Prompt(text_tokens)
    llava_flops = model(prompt).flops("full")
    if method in COMPRESSORS:
        costs = _compressor_costs(model, method, prompt)
    elif method in REDUCTIONS[1:]:
        costs = _reduction_costs(model, method, prompt)
    else:
        methods = ", ".join([*REDUCTIONS[1:], *sorted(COMPRESSORS)])
        raise ValueError(f"budget.method: unknown {method!r}; use {methods}")
    settings = [BudgetedSetting(settings, flops, flops / llava_flops) for settings, flops in costs]
    within = [setting for setting in settings if setting.share <= share]
    if not within:
        least = min(settings, key=lambda setting: setting.flops)
        text = ", ".join(f"{key}={value}" for key, value in least.settings.items())
        raise ValueError(
            f"budget.share: {method} needs at least {least.share:.1%} of LLaVA's FLOPs ({text}), found {share:.1%}"
        )
    return max(within, key=lambda setting: setting.flops)


def _reduction_costs(model: CostModel, method: str, prompt: Prompt) -> list[tuple[dict[str, Any], float]]:
    """Return every setting that drops another number of tokens at some layer, with its FLOPs."""
    published = published_reduction(method)
    layers = reduction_layers(published, model.layers)
    if method == "vtw":
        reductions = [replace(published, layers=[layer], reference_depth=0) for layer in range(model.layers)]
    else:
        visual = model(prompt).visual_tokens
        # the shares at which the number of tokens that stay changes at one of the layers
        shares = {(kept / visual) ** (1 / stage) for kept in range(visual) for stage in range(1, len(layers) + 1)}
        reductions = [replace(published, layers=layers, reference_depth=0, keep=keep) for keep in sorted(shares)]
    return [
        (
            {f"reduction.{field}": value for field, value in asdict(reduction).items()},
            estimate_with_reduction(model, prompt, reduction).flops("full"),
        )
        for reduction in reductions
    ]


def _compressor_costs(model: CostModel, name: str, prompt: Prompt) -> list[tuple[dict[str, Any], float]]:
    """Return every size that a compressor can have on the vision tower's grid, with its FLOPs."""
    costs: list[tuple[dict[str, Any], float]] = []
    refusal: ValueError | None = None
    for size in range(1, math.isqrt(model.patches) + 1):
        fields = {"compressor": name, "compressor_size": size, "prefusion_layers": 0}
        try:
            mini = CostModel(llava_mini_config(model.config, **fields))
        except ValueError as error:  # some compressors take divisors of the grid alone
            refusal = error
            continue
        costs.append(({"compressor.name": name, "compressor.size": size}, mini(prompt).flops("full")))
    if refusal is not None and not costs:
        raise refusal
    return costs
