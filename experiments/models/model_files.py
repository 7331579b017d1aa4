"""Hashes of the files of a model that lies on this machine. They are made before it is loaded, without torch."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from experiments.config.schema import Config, ModelConfig
from experiments.files import ASSETS, file_sha256, file_stamps

ASSET_PREFIX = "asset:"
"""Marks the name of a model that ships with the project."""
_SOURCES = ("path", "vision", "language", "adapter")


def shipped_folder(source: str) -> str:
    """Return the folder of a model that ships with the project for `asset:NAME`, and any other source as it is.

    Settings hold the name, so that a cell is the same in every clone.
    """
    return str(ASSETS / source.removeprefix(ASSET_PREFIX)) if source.startswith(ASSET_PREFIX) else source


def model_file_versions(config: Config) -> dict[str, str]:
    """Return a hash of the files behind each setting that names weights of a cell, by the dotted setting.

    Models of the hub count by their names, which are settings.

    Args:
        config: The cell's configuration.

    Returns:
        16 hex digits for each setting that names a file or folder on this machine.

    Raises:
        OSError: If a file cannot be read.
    """
    sources = {f"model.{name}": getattr(config.model, name, None) for name in _SOURCES}
    sources["train.lora_init"] = config.train.lora_init
    if config.prefusion.init.endswith(".safetensors"):
        sources["prefusion.init"] = config.prefusion.init
    digests = {setting: _digest(source) for setting, source in sources.items() if source}
    return {setting: hashlib.sha256(digest.encode()).hexdigest()[:16] for setting, digest in digests.items() if digest}


def model_files_digest(model: ModelConfig) -> str:
    """Return a hash of the files in the folders that a model is read from.

    Models of the hub count by their names, which are settings.

    Args:
        model: The model's configuration.

    Returns:
        Names and hashes of the files as one text, "" if the model is read from no folder.

    Raises:
        OSError: If a file cannot be read.
    """
    return " ".join(filter(None, (_digest(source) for name in _SOURCES if (source := getattr(model, name, None)))))


def _digest(source: str) -> str:
    """Return names and hashes of the files of one source, "" for a name of the hub."""
    folder = shipped_folder(source)
    return " ".join(_file_digest(*stamp) for stamp in file_stamps([folder] if Path(folder).exists() else []))


@functools.cache
def _file_digest(name: str, size: int, time: int) -> str:
    """Return name and hash of one file. It is read once by each process, as long as size and time stay the same."""
    return f"{Path(name).name} {file_sha256(Path(name))}" if Path(name).is_file() else ""
