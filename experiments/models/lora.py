"""Low-rank adapters (LoRA, Hu et al. 2022) in the language model, through peft."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

if TYPE_CHECKING:
    from peft import PeftModel

LANGUAGE_LAYERS = "language_model.layers"
FULLY_TRAINED_MODULES = ("multi_modal_projector", "compressor", "prefusion")


def add_adapters(model: PreTrainedModel, rank: int, start: str | None = None) -> PeftModel:
    """Add adapters to all linear layers in the language model's decoder layers, and freeze the rest but new modules.

    Projector, compressor and pre-fusion are trained in full: they start untrained, and a low-rank update would leave them
    so. Updates are scaled by alpha / rank = 2, without dropout. LLaVA-1.5's own recipe has the same ratio, with rank 128,
    learning rate 2e-4, and 2e-5 for the projector.

    Args:
        model: A LLaVA or LLaVA-Mini; changed in place.
        rank: Rank of the adapters.
        start: A folder that `save_and_merge_adapter` wrote: adapters and new modules start with its weights. None for adapters
            that change nothing yet.

    Raises:
        ImportError: If peft is not installed.
        ValueError: If the language model has no such layers, `start` holds no adapter in safetensors, or it holds one of
            another model or rank.
    """
    peft = _import_peft("train.lora_rank")
    linear_names = [name for name, m in model.named_modules() if LANGUAGE_LAYERS in name and isinstance(m, nn.Linear)]
    if not linear_names:
        raise ValueError(
            f"train.lora_rank: {type(model).__name__} has no linear layers in {LANGUAGE_LAYERS}; set train.lora_rank=0"
        )
    suffixes = sorted({name.rpartition(".")[2] for name in linear_names})
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=rf".*{re.escape(LANGUAGE_LAYERS)}\..*\.({'|'.join(suffixes)})",
        modules_to_save=[name for name in FULLY_TRAINED_MODULES if getattr(model.model, name, None) is not None],
    )
    adapted = peft.get_peft_model(model, config)
    if start is not None:
        _require_adapter(peft, start, "train.lora_init")
        _load_weights(peft, adapted, start)
    return adapted


def _load_weights(peft: ModuleType, adapted: PeftModel, folder: str) -> None:
    """Load the weights of a saved adapter into a model with an adapter of the same names and shapes."""
    saved = peft.utils.load_peft_weights(folder, device="cpu")
    own = peft.get_peft_model_state_dict(adapted)
    for name in sorted(saved.keys() | own.keys()):
        shapes = [tuple(weights[name].shape) if name in weights else "no such weight" for weights in (saved, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"train.lora_init: '{folder}' does not fit this model: {name} is {shapes[0]} there and {shapes[1]} here"
            )
    peft.set_peft_model_state_dict(adapted, saved)


def merge_saved_adapter(model: PreTrainedModel, folder: str) -> None:
    """Merge an adapter, with its fully trained modules, into a model like the one that it was trained in.

    Args:
        model: The model; changed in place.
        folder: A folder that `save_and_merge_adapter` wrote.

    Raises:
        ImportError: If peft is not installed.
        ValueError: If the folder holds no adapter in safetensors, or one of another model.
    """
    peft = _import_peft("model.adapter")
    _require_adapter(peft, folder, "model.adapter")
    try:
        peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    except (RuntimeError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(f"model.adapter: '{folder}' does not fit this model: {first_line}") from error


def save_and_merge_adapter(adapted: PeftModel, folder: Path) -> None:
    """Save the adapter, with its fully trained modules, to `folder`, and merge it into the adapted model."""
    adapted.save_pretrained(str(folder), is_main_process=PartialState().is_main_process)
    adapted.merge_and_unload()


def _require_adapter(peft: ModuleType, folder: str, setting: str) -> None:
    if not (Path(folder) / peft.utils.SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ValueError(f"{setting}: '{folder}' holds no {peft.utils.SAFETENSORS_WEIGHTS_NAME}")


def _import_peft(setting: str) -> ModuleType:
    if not is_peft_available():
        raise ImportError(f"{setting} needs peft: pip install peft")
    return importlib.import_module("peft")
