"""Weights of a checkpoint in the layout of the official code, matched to the parameters of our model."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from .checkpoint import StoredTensor, find_weights
from .configuration import LlavaMiniConfig
from .modeling import LlavaMiniForConditionalGeneration

OFFICIAL_VISION_TOWER = "model.vision_tower.vision_tower.vision_model."
# Buffers that older versions of transformers saved. The installed version recomputes them.
IGNORED_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")


class ModelPart(NamedTuple):
    """Name one part of the model and the prefixes of its weights' names.

    Args:
        title: Name of the part in messages and counts.
        ours: Prefix in our classes.
        official: Prefix in official checkpoints.
        disk: Prefix in our checkpoints, which follow LLaVA's.
    """

    title: str
    ours: str
    official: str
    disk: str


MODEL_PARTS = (
    ModelPart("language model", "model.language_model.", "model.", "language_model.model."),
    ModelPart("language model", "lm_head.", "lm_head.", "language_model.lm_head."),
    ModelPart(
        "projector", "model.multi_modal_projector.linear_1.", "model.mm_projector.0.", "multi_modal_projector.linear_1."
    ),
    ModelPart(
        "projector", "model.multi_modal_projector.linear_2.", "model.mm_projector.2.", "multi_modal_projector.linear_2."
    ),
    ModelPart("compressor", "model.compressor.", "model.compressor.", "model.compressor."),
    ModelPart("pre-fusion", "model.prefusion.layers.", "model.prefusion_layers.", "model.prefusion.layers."),
    ModelPart("vision tower", "model.vision_tower.", OFFICIAL_VISION_TOWER, "vision_tower."),
)


@dataclass(frozen=True)
class TargetParameter:
    """Describe a parameter of our model.

    Args:
        part: Title of the model part it belongs to.
        disk: Its name in our checkpoints.
        shape: Its shape.
    """

    part: str
    disk: str
    shape: tuple[int, ...]


def list_parameters(config: LlavaMiniConfig) -> dict[str, TargetParameter]:
    """Return our model's parameters by their official names. The model is built on the meta device."""
    with torch.device("meta"):
        model = LlavaMiniForConditionalGeneration(config)
    parameters = {}
    for name, parameter in model.named_parameters():
        part = next(part for part in MODEL_PARTS if name.startswith(part.ours))
        suffix = name.removeprefix(part.ours)
        parameters[part.official + suffix] = TargetParameter(part.title, part.disk + suffix, tuple(parameter.shape))
    return parameters


def count_parameters(parameters: dict[str, TargetParameter]) -> dict[str, int]:
    """Count the numbers in each model part's parameters."""
    counts = {part.title: 0 for part in MODEL_PARTS}
    for parameter in parameters.values():
        counts[parameter.part] += math.prod(parameter.shape)
    return counts


def replace_vision_tower(weights: dict[str, StoredTensor], vision_folder: Path | None) -> dict[str, StoredTensor]:
    """Replace the checkpoint's own vision tower weights by those in the vision tower's folder, if it has any."""
    replacements = {} if vision_folder is None else find_weights(vision_folder)
    if not replacements:
        return weights
    # A whole CLIPModel also holds its text encoder and prefixes the vision tower with "vision_model.". Newer versions of
    # transformers save a vision tower alone without a prefix.
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in replacements) else ""
    replacements = {
        OFFICIAL_VISION_TOWER + key.removeprefix(prefix): weight
        for key, weight in replacements.items()
        if key.startswith(prefix)
    }
    others = {name: weight for name, weight in weights.items() if not name.startswith("model.vision_tower.")}
    return others | replacements


def match_weights(
    src: Path, parameters: dict[str, TargetParameter], weights: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Match weights to the model's parameters.

    Args:
        src: Folder of the official checkpoint, for the error message.
        parameters: Parameters of our model by official name; see [`list_parameters`].
        weights: Weights of the official checkpoint by name.

    Returns:
        The weights by their names in our checkpoints.

    Raises:
        ValueError: If weights are missing, unexpected, of another shape or of an unsupported dtype. The message lists
            the first three of each.
    """
    plan: dict[str, StoredTensor] = {}
    faults: dict[str, list[str]] = {"missing": [], "unexpected": [], "misshapen": [], "of another dtype": []}
    for name, weight in weights.items():
        parameter = parameters.get(name)
        is_tied_head = name == "lm_head.weight" and parameter is None
        if IGNORED_BUFFERS.search(name) or is_tied_head:
            continue
        if parameter is None:
            faults["unexpected"].append(f"{name} {list(weight.shape or ())}")
        elif weight.shape not in (None, parameter.shape):
            faults["misshapen"].append(f"{name} {list(weight.shape or ())}, not {list(parameter.shape)}")
        elif weight.dtype is None and weight.shape is not None:
            faults["of another dtype"].append(f"{name} in {weight.file.name}")
        else:
            plan[parameter.disk] = weight
    faults["missing"] = [
        f"{name} {list(parameter.shape)}" for name, parameter in parameters.items() if name not in weights
    ]
    summaries = [
        f"{len(names)} {fault} ({'; '.join(names[:3])}{'; ...' if len(names) > 3 else ''})"
        for fault, names in faults.items()
        if names
    ]
    if summaries:
        raise ValueError(f"the weights in {src} do not match its config.json: {', '.join(summaries)}")
    return plan


__all__ = [
    "OFFICIAL_VISION_TOWER",
    "TargetParameter",
    "count_parameters",
    "list_parameters",
    "match_weights",
    "replace_vision_tower",
]
