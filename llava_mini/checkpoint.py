"""Weights in files, safetensors or torch's own, whole or sharded: found by name, read and written a shard at a time."""

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

log = logging.getLogger(__name__)

SHARD_BYTES = 10**9
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class Weight:
    """A tensor in a file; `shape` is None if only the index is at hand, `dtype` if it is none of ours."""

    file: Path
    key: str
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; FileNotFoundError or ValueError with its name if there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def find_weights(folder: Path, partial: bool = False) -> dict[str, Weight]:
    """The weights of a checkpoint folder by name; with `partial`, an index stands in for files that are absent."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return _headers([folder / name])
        if index.is_file():
            names: dict[str, str] = read_json(index).get("weight_map", {})
            files = [folder / file for file in dict.fromkeys(names.values())]
            absent = [file for file in files if not file.is_file()]
            if absent and not partial:
                raise FileNotFoundError(
                    f"{index} names {len(absent)} files that do not exist, the first {absent[0].name}"
                )
            stand_ins = {key: Weight(folder / f, key, None, None) for key, f in names.items() if folder / f in absent}
            return _headers([file for file in files if file not in absent]) | stand_ins
    return {}


def _headers(files: list[Path]) -> dict[str, Weight]:
    weights: dict[str, Weight] = {}
    for file in files:
        with _open(file) as opened:
            if isinstance(opened, dict):
                found = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in opened.items()}
            else:
                slices = {key: opened.get_slice(key) for key in opened.offset_keys()}
                found = {key: (tuple(s.get_shape()), DTYPES.get(s.get_dtype())) for key, s in slices.items()}
        for key, (shape, dtype) in found.items():
            if key in weights:
                raise ValueError(f"{key} is in both {weights[key].file} and {file}")
            weights[key] = Weight(file, key, shape, dtype if dtype in DTYPES.values() else None)
    return weights


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    """A safetensors file as `safe_open` opens it, another as the dictionary in it. Both are mapped, not read."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                yield opened
        else:
            opened = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            if not (isinstance(opened, dict) and all(isinstance(value, Tensor) for value in opened.values())):
                raise ValueError(f"{file} holds no dictionary of tensors")
            yield opened
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file} cannot be read, it may be incomplete: {reason}") from error


def write_weights(plan: dict[str, Weight], out: Path) -> None:
    """Writes the weights under the names that they have in `plan` as safetensors of at most SHARD_BYTES, or of one
    tensor, each; with an index if there are several. No more than one such file is held at a time."""
    split = split_state_dict_into_shards_factory(
        plan,
        get_storage_size=lambda weight: math.prod(weight.shape) * weight.dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    for shard, names in split.filename_to_tensors.items():
        tensors: dict[str, Tensor] = {}
        for file, group in groupby(names, key=lambda name: plan[name].file):
            with _open(file) as opened:
                for name in group:
                    key = plan[name].key
                    tensor = opened[key] if isinstance(opened, dict) else opened.get_tensor(key)
                    tensors[name] = tensor.contiguous()
        save_file(tensors, out / shard, metadata={"format": "pt"})
        log.info("wrote %s: %d tensors", shard, len(tensors))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


__all__ = ["Weight", "find_weights", "read_json", "write_weights"]
