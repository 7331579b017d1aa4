"""A hash of the files of a model that lies on this machine. It is made before the model is loaded, and imports no torch."""

from __future__ import annotations

import functools
from pathlib import Path

from experiments.config.schema import ModelConfig
from experiments.files import ASSETS, file_sha256, file_stamps

ASSET_PREFIX = "asset:"
"""Marks the name of a model that ships with the project."""
_SOURCES = ("path", "vision", "language", "adapter")


def shipped_folder(source: str) -> str:
    """Return the folder of a model that ships with the project for `asset:NAME`, and any other source as it is.

    Settings hold the name, so that a cell is the same in every clone.
    """
    return str(ASSETS / source.removeprefix(ASSET_PREFIX)) if source.startswith(ASSET_PREFIX) else source


def model_files_digest(model: ModelConfig, *others: str | None) -> str:
    """Return a hash of the files in the folders that a model is read from.

    Models of the hub count by their names, which are settings.

    Args:
        model: The model's configuration.
        others: Further files, or folders of files, that its weights come from.

    Returns:
        Names and hashes of the files as one text, "" if the model is read from no folder.

    Raises:
        OSError: If a file cannot be read.
    """
    given = (*(getattr(model, name, None) for name in _SOURCES), *others)
    sources = [shipped_folder(source) for source in given if source]
    stamps = file_stamps(source for source in sources if Path(source).exists())
    return " ".join(_file_digest(*stamp) for stamp in stamps)


@functools.cache
def _file_digest(name: str, size: int, time: int) -> str:
    """Return name and hash of one file. It is read once by each process, as long as size and time stay the same."""
    return f"{Path(name).name} {file_sha256(Path(name))}" if Path(name).is_file() else ""
