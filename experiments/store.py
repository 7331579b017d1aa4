"""Records on disk: one JSON file a cell, named by the cell's identity, whole or not there at all."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("llava_mini", "probes", "experiments")
_REPORTING = "report"  # how records are drawn does not change them


@functools.cache
def code_version() -> str:
    """16 hex digits over the sources that a record depends on: the three packages but experiments/report."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for source in sorted((root / package).rglob("*.py")):
            if _REPORTING not in source.relative_to(root / package).parts:
                digest.update(source.relative_to(root).as_posix().encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        shown = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return shown.stdout.strip()


def provenance(device: torch.device) -> dict[str, Any]:
    """What a reader needs to know about the machine and the versions behind a record."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} ({torch.get_num_threads()} threads)"
    )
    return {
        "commit": _commit(),
        "code": code_version(),
        "device": name,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers")},
    }


def write_atomically(path: Path, text: str) -> None:
    """Write aside, then rename: a reader never sees half a file."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as aside:
        try:
            aside.write(text)
            aside.flush()
            os.fsync(aside.fileno())
        except BaseException:
            os.unlink(aside.name)
            raise
    os.chmod(aside.name, 0o644)
    os.replace(aside.name, path)


class Store:
    """The results folder: `records/<identity>.json`, and `work/<identity>/` while a cell trains.

    Raises:
        PermissionError: if the folder cannot be made or written, before anything has been computed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.records = self.folder / "records"
        try:
            self.records.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.records):
                pass
        except OSError as error:
            raise PermissionError(
                f"results folder '{self.folder}' cannot be written ({error.strerror}); choose another with results=FOLDER"
            ) from error

    def path(self, identity: str) -> Path:
        return self.records / f"{identity}.json"

    def work(self, identity: str) -> Path:
        return self.folder / "work" / identity

    def finished(self, identity: str) -> bool:
        """Whether a whole record of this cell is there. A file that is no JSON counts as none."""
        try:
            return json.loads(self.path(identity).read_text())["status"] == "finished"
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def write(self, record: dict[str, Any]) -> Path:
        path = self.path(record["id"])
        write_atomically(path, json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n")
        return path
