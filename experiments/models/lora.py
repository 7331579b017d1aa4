"""Low-rank adapters (LoRA, Hu et al. 2022) through peft: a small part of a large language model is trained."""

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
IN_FULL = ("multi_modal_projector", "compressor", "prefusion")


def _peft(wanted: str) -> ModuleType:
    if not is_peft_available():
        raise ImportError(f"{wanted} needs peft: pip install peft")
    return importlib.import_module("peft")


def adapt(model: PreTrainedModel, rank: int) -> PeftModel:
    """Adapters on all linear maps in the language model's layers; all else of it and the vision tower stay as they are.

    Projector, compressor and pre-fusion are trained in full: a small change to layers that have learned nothing would
    leave them so. Updates are scaled by alpha / rank = 2 and have no dropout; LLaVA-1.5's own recipe has the same ratio,
    rank 128, rate 2e-4 and 2e-5 for the projector.

    Raises:
        ImportError: if peft is not installed.
        ValueError: if the language model has no such layers.
    """
    peft = _peft("train.lora")
    inside = [name for name, m in model.named_modules() if LANGUAGE_LAYERS in name and isinstance(m, nn.Linear)]
    if not inside:
        raise ValueError(f"train.lora: {type(model).__name__} has no linear maps in {LANGUAGE_LAYERS}")
    kinds = sorted({name.rpartition(".")[2] for name in inside})
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=rf".*{re.escape(LANGUAGE_LAYERS)}\..*\.({'|'.join(kinds)})",
        modules_to_save=[name for name in IN_FULL if getattr(model.model, name, None) is not None],
    )
    return peft.get_peft_model(model, config)


def apply(model: PreTrainedModel, folder: str) -> None:
    """Put an adapter that `merge` saved, with what was trained in full, into a model like the one that it was trained in.

    Raises:
        ImportError: if peft is not installed.
        ValueError: if the folder holds no adapter in safetensors, or one of another model.
    """
    peft = _peft("model.adapter")
    if not (Path(folder) / peft.utils.SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ValueError(f"model.adapter: '{folder}' holds no {peft.utils.SAFETENSORS_WEIGHTS_NAME}")
    try:
        peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"model.adapter: '{folder}' is not of a model like this one: {first}") from error


def merge(adapted: PeftModel, folder: Path) -> None:
    """Save the adapter with what was trained in full to `folder`, and put it into the model that was adapted."""
    adapted.save_pretrained(str(folder), is_main_process=PartialState().is_main_process)
    adapted.merge_and_unload()
