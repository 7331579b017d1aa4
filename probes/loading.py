"""Loading of a model and its processor from a folder or the hub, checked for missing weights."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""Names that a model can have on the hub: NAME or OWNER/NAME."""
_LANGUAGE_LAYER = re.compile(r"language_model\.(?:model\.)?layers\.(\d+)\.")


def load_model(name: str, device: str = "auto", dtype: str = "auto") -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a vision-language model and its processor.

    For a LLaVA-Mini the package `llava_mini` is imported, which registers it with transformers.

    Args:
        name: Folder, or name on the hub.
        device: "auto" (CUDA, then MPS, then CPU), or a device of torch.
        dtype: "auto" for the dtype of the checkpoint, or a dtype of torch such as "bfloat16".

    Returns:
        The model in eval mode, and its processor.

    Raises:
        ValueError: If weights are missing, unreadable, of another shape or of layers that the config lacks, the device or dtype is unknown or absent, or the model is not a
            vision-language model.
        OSError: If there is no such model, in a folder or on the hub.

    Example:
        >>> model, processor = load_model(model.name_or_path, device="cpu")
        >>> model.config.model_type
        'llava'
    """
    target = torch_device(device)
    found = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype: unknown {dtype!r}; use auto, float32, bfloat16 or float16")
    check_model_config(name)
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            name,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except SafetensorError as error:
        raise ValueError(f"model: the weights of {name!r} cannot be read, they may be incomplete: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"model: {name!r} lacks {len(missing)} weights, such as {missing[0]}; name a complete checkpoint"
        )
    if mismatched := sorted(report["mismatched_keys"]):
        weight, found, expected = mismatched[0]
        raise ValueError(
            f"model: {name!r} has {len(mismatched)} weights of another shape than its config.json says, such as {weight}: "
            f"{list(found)}, not {list(expected)}"
        )
    layers = model.config.get_text_config().num_hidden_layers
    numbers = (_LANGUAGE_LAYER.search(weight) for weight in report["unexpected_keys"])
    if more := sorted({int(number[1]) for number in numbers if number and int(number[1]) >= layers}):
        raise ValueError(
            f"model: {name!r} has weights of layers {more}, and its config.json names {layers} layers (num_hidden_layers)"
        )
    return model.eval().to(target), AutoProcessor.from_pretrained(name)


def check_model_config(name: str) -> None:
    """Check that a folder or hub name provides the config of a vision-language model. No weights are read.

    Args:
        name: Folder, or name on the hub.

    Raises:
        ValueError: If the config cannot be read, or is not that of a vision-language model.
        OSError: If there is no such model, in a folder or on the hub.

    Example:
        >>> check_model_config(model.name_or_path)
    """
    _check_name(name)
    _import_llava_mini(name)
    try:
        config = AutoConfig.from_pretrained(name)
    except OSError as error:
        if Path(name).is_dir():
            raise
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"model: there is no folder {name!r}, and the hub does not provide it: {reason}") from error
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(
            f"model: {name!r} is a {config.model_type}, which takes no images; name a vision-language model"
        )


def torch_device(name: str) -> torch.device:
    """Return a device by name; "auto" is CUDA, MPS or the CPU.

    Raises:
        ValueError: If there is no such device here.

    Example:
        >>> torch_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"device: {name!r} is not available here; use cpu or auto") from None
    return device


def _check_name(name: str) -> None:
    """Check that a name is that of a checkpoint's folder, or could be one on the hub.

    Raises:
        FileNotFoundError: If it is neither.
    """
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise FileNotFoundError(f"model: folder {name!r} has no config.json; name the folder of a checkpoint")
    elif not HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"model: no folder {name!r}; name a folder, or a model on the hub as OWNER/NAME")


def _import_llava_mini(name: str) -> None:
    """Import LLaVA-Mini's package if a folder holds one, which registers it. No other name in a config is imported."""
    path = Path(name) / "config.json"
    if not path.is_file():
        return
    try:
        model_type = json.loads(path.read_text()).get("model_type", "")
    except (ValueError, AttributeError):
        raise ValueError(f"model: {path} is not a JSON object; is it a complete checkpoint?") from None
    if model_type == "llava_mini" and importlib.util.find_spec(model_type):
        importlib.import_module(model_type)
