"""Checkpoint files, safetensors or torch's own, whole or sharded: listing their weights, and writing new shards."""

from __future__ import annotations

import json
import logging
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MAX_SHARD_BYTES = 10**9
SAFETENSORS_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredTensor:
    """Locate one tensor in a checkpoint file.

    Args:
        file: The file that holds the tensor.
        key: The tensor's name in the file.
        shape: Its shape; None if only an index names the tensor and its file is absent.
        dtype: Its dtype; None if it is not float16, bfloat16 or float32.
    """

    file: Path
    key: str
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not JSON or holds another value than an object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; it holds a {type(content).__name__}")
    return content


def find_weights(folder: Path, partial: bool = False) -> dict[str, StoredTensor]:
    """Locate the weights of a checkpoint folder without reading their values.

    Args:
        folder: Folder with model.safetensors or pytorch_model.bin, whole or sharded with an index.
        partial: Accept an index whose shards are absent. Their weights then have neither shape nor dtype.

    Returns:
        Location of each weight by name; empty if the folder holds no weights.

    Raises:
        FileNotFoundError: If an index names absent files and `partial` is not set.
        ValueError: If a file cannot be read, or two files hold the same name.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return _read_headers([folder / name])
        if index.is_file():
            shard_names: dict[str, str] = read_json(index).get("weight_map", {})
            files = [folder / file for file in dict.fromkeys(shard_names.values())]
            absent = [file for file in files if not file.is_file()]
            if absent and not partial:
                raise FileNotFoundError(
                    f"{index} names {len(absent)} files that do not exist, the first {absent[0].name}"
                )
            unread = {
                key: StoredTensor(folder / shard, key, None, None)
                for key, shard in shard_names.items()
                if folder / shard in absent
            }
            return _read_headers([file for file in files if file not in absent]) | unread
    return {}


def _read_headers(files: list[Path]) -> dict[str, StoredTensor]:
    weights: dict[str, StoredTensor] = {}
    for file in files:
        with _open_weights(file) as opened:
            if isinstance(opened, dict):
                headers = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in opened.items()}
            else:
                slices = {key: opened.get_slice(key) for key in opened.offset_keys()}
                headers = {
                    key: (tuple(s.get_shape()), SAFETENSORS_DTYPES.get(s.get_dtype())) for key, s in slices.items()
                }
        for key, (shape, dtype) in headers.items():
            if key in weights:
                raise ValueError(f"{key} is in both {weights[key].file} and {file}")
            weights[key] = StoredTensor(file, key, shape, dtype if dtype in SAFETENSORS_DTYPES.values() else None)
    return weights


@contextmanager
def _open_weights(file: Path) -> Iterator[Any]:
    """Open a weight file: safetensors as `safe_open` does, another as its dictionary. Both are mapped, not read."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                yield opened
        else:
            opened = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            if not (isinstance(opened, dict) and all(isinstance(value, Tensor) for value in opened.values())):
                raise ValueError(f"{file} does not hold a dictionary of tensors")
            yield opened
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file} cannot be read, it may be incomplete: {reason}") from error


def write_weights(plan: dict[str, StoredTensor], out: Path) -> None:
    """Copy weights into safetensors files, with an index if there are several.

    Only one output file's tensors are in memory at a time.

    Args:
        plan: Source of each weight by its new name. Every source needs a shape and a dtype.
        out: Folder to write to. Each file has at most MAX_SHARD_BYTES, or one tensor that is larger.
    """
    split = split_state_dict_into_shards_factory(
        plan,
        get_storage_size=lambda weight: math.prod(weight.shape) * weight.dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD_BYTES,
    )
    for shard, names in split.filename_to_tensors.items():
        tensors: dict[str, Tensor] = {}
        for file, group in groupby(names, key=lambda name: plan[name].file):
            with _open_weights(file) as opened:
                for name in group:
                    key = plan[name].key
                    tensor = opened[key] if isinstance(opened, dict) else opened.get_tensor(key)
                    tensors[name] = tensor.contiguous()
        save_file(tensors, out / shard, metadata={"format": "pt"})
        log.info("wrote %s: %d tensors", shard, len(tensors))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


__all__ = ["StoredTensor", "find_weights", "read_json", "write_weights"]
