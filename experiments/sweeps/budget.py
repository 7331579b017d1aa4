"""Which setting of a method costs as much as asked: for tables at equal FLOPs."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import LlavaConfig

from experiments.config.schema import REDUCTIONS
from experiments.cost.architectures import GEOMETRIES, geometry, mini
from experiments.cost.estimate import Geometry, Prompt
from experiments.cost.reduced_prompts import published, reduced
from experiments.models.reduction_schedule import first_layers
from llava_mini.compressors import COMPRESSORS


@dataclass(frozen=True)
class Budgeted:
    """A setting of a method, and what it costs.

    Attributes:
        settings: Dotted keys of the cell's configuration and their values.
        flops: Of the whole model over the prompt, products of attention included ("full").
        share: Of the FLOPs of the LLaVA itself.
    """

    settings: dict[str, Any]
    flops: float
    share: float


def settings(model: Any, method: str, share: float, text: int) -> dict[str, Any]:
    """What `within` finds for a cell's model: one of the geometries by its name, or the folder that it is in.

    Raises:
        ValueError: If its sizes are not known, or as `within`.
    """
    return _settings(model.name if model.name in GEOMETRIES else str(model.get("path")), method, share, text)


@functools.cache
def _settings(name: str, method: str, share: float, text: int) -> dict[str, Any]:
    return within(geometry(name), method, share, text).settings


def within(llava: LlavaConfig, method: str, share: float, text: int) -> Budgeted:
    """The setting of `method` that costs most among those that cost no more than `share` of LLaVA's FLOPs on a picture
    and `text` tokens: the share that `fastv` and `pyramid_drop` keep, at the layers of conf/reduction; the layer of
    `vtw`; or the size C of a compressor, without pre-fusion.

    Raises:
        ValueError: If there is no such method, or each of its settings costs more.
    """
    plain, prompt = Geometry(llava), Prompt(text)
    whole = plain(prompt).flops("full")
    if method in COMPRESSORS:
        costs = _compressor(plain, method, prompt)
    elif method in REDUCTIONS[1:]:
        costs = _reduction(plain, method, prompt)
    else:
        known = ", ".join([*REDUCTIONS[1:], *sorted(COMPRESSORS)])
        raise ValueError(f"no method {method!r} that fits into a budget; use {known}")
    found = [Budgeted(settings, flops, flops / whole) for settings, flops in costs]
    fitting = [each for each in found if each.share <= share]
    if not fitting:
        least = min(found, key=lambda each: each.flops)
        setting = ", ".join(f"{key}={value}" for key, value in least.settings.items())
        raise ValueError(
            f"{method} cannot get down to {share:.1%} of LLaVA's FLOPs: its least is {least.share:.1%}, with {setting}"
        )
    return max(fitting, key=lambda each: each.flops)


def _reduction(plain: Geometry, method: str, prompt: Prompt) -> list[tuple[dict[str, Any], float]]:
    """Every setting that drops another number of tokens somewhere, and its FLOPs."""
    setting = published(method)
    layers = first_layers(setting, plain.layers)
    if method == "vtw":
        settings = [replace(setting, layers=[layer], of=0) for layer in range(plain.layers)]
    else:
        visual = plain(prompt).visual_tokens
        # where the number of tokens that stay changes at one of the layers
        steps = {(kept / visual) ** (1 / stage) for kept in range(visual) for stage in range(1, len(layers) + 1)}
        settings = [replace(setting, layers=layers, of=0, keep=keep) for keep in sorted(steps)]
    return [
        (
            {f"reduction.{field}": value for field, value in asdict(each).items()},
            reduced(plain, prompt, each).flops("full"),
        )
        for each in settings
    ]


def _compressor(plain: Geometry, name: str, prompt: Prompt) -> list[tuple[dict[str, Any], float]]:
    """Every size that the compressor can have on the tower's grid, and its FLOPs."""
    costs: list[tuple[dict[str, Any], float]] = []
    refusal: ValueError | None = None
    for size in range(1, math.isqrt(plain.patches) + 1):
        fields = {"compressor": name, "compressor_size": size, "prefusion_layers": 0}
        try:
            geometry = Geometry(mini(plain.config, **fields))
        except ValueError as error:  # some compressors take divisors of the grid alone
            refusal = error
            continue
        costs.append(({"compressor.name": name, "compressor.size": size}, geometry(prompt).flops("full")))
    if refusal is not None and not costs:
        raise refusal
    return costs
