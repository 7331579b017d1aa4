"""Memory of this machine that is free for workers, and an estimate of what one worker needs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from experiments.models.model_files import shipped_folder

_GIB = 2**30
PROCESS_BYTES = 3 * _GIB // 2  # beside weights: 1.1 GiB measured for the tiny model in training with 32 rows a step
_MAX_CACHED_BYTES = 4 * _GIB  # build.py caches a base model up to this size beside the cell's copy of it
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that new processes can use: what the machine has free, within the limits of the control groups.

    Memory of a control group that caches files counts as free, since Linux drops it when it is needed.

    Args:
        root: The root of the file system, where Linux shows control groups under `sys/fs/cgroup`.
    """
    return min([psutil.virtual_memory().available, *_cgroup_free(root)])


def _cgroup_free(root: Path) -> Iterator[int]:
    """Yield the free bytes of this process's control group and of those above it, in version 1 and 2 of the interface."""
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:  # "0::/path" in version 2, "4:memory:/path" in version 1
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = mount, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = mount / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if (free := _folder_free(folder, *names)) is not None:
                yield free
            if folder == top:
                break


def _folder_free(folder: Path, limit_name: str, used_name: str, cache_name: str) -> int | None:
    try:
        limit = (folder / limit_name).read_text().strip()
        if limit == "max":
            return None
        used = int((folder / used_name).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return max(int(limit) - used + int(statistics.get(cache_name, 0)), 0)


def worker_memory(config: Any) -> int:
    """Estimate the bytes that a worker needs for a cell.

    That is `PROCESS_BYTES`, and the weights several times: the base model that is cached for the next cell, the cell's
    copy, and in training the gradients and AdamW's two moments. Activations of large batches are not known before.

    Args:
        config: The cell's configuration: `model`, `train` and `device`.
    """
    weights = model_bytes(config.model)
    copies = 1 + (weights <= _MAX_CACHED_BYTES)
    trains = config.train.max_steps or config.train.num_train_epochs
    if trains and config.train.trainable == "all" and not config.train.lora_rank:
        copies += 3
    return PROCESS_BYTES + copies * weights


def model_bytes(model: Any) -> int:
    """Return the bytes of a base model's weights in its dtype, 0 if they are not on this machine yet.

    Args:
        model: The configuration of the model.
    """
    parameters = sum(_parameters(folder) for folder in _model_folders(model))
    return parameters * _ITEM_BYTES.get(model.dtype, 4)


def _model_folders(model: Any) -> Iterator[Path]:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for name in ("path", "vision", "language"):
        if not (source := getattr(model, name, None)):
            continue
        folder = Path(shipped_folder(source))
        if not folder.is_dir():
            try:
                cached = try_to_load_from_cache(source, "config.json")
            except HFValidationError:  # neither a folder nor a hub name, which the cell reports
                continue
            if not isinstance(cached, str):
                continue
            folder = Path(cached).parent
        yield folder


def _parameters(folder: Path) -> int:
    """Return the number of parameters in the safetensors files of a folder. Only their headers are read."""
    from safetensors import SafetensorError, safe_open

    count = 0
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="np") as tensors:
                count += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
        except (OSError, SafetensorError):  # the cell reports it
            continue
    return count
