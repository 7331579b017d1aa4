"""Where a record comes from: commit, versions, device, and a hash of the code that computed it."""

from __future__ import annotations

import ast
import functools
import hashlib
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a sweep whose cells are all finished does not wait for torch
    import torch

ROOT = Path(__file__).resolve().parents[1]
RECORD_SOURCES = (
    "llava_mini",
    "probes",
    "experiments/cell.py",
    "experiments/config",
    "experiments/cost",
    "experiments/data",
    "experiments/devices.py",
    "experiments/evaluation",
    "experiments/models",
    "experiments/run_cell.py",
    "experiments/training",
)
"""The files and folders whose code can change what a record holds. Reports, sweeps and benchmarks are not among them."""


@functools.cache
def code_version(root: Path = ROOT, sources: Sequence[str] = RECORD_SOURCES) -> str:
    """Hash the code that a record depends on.

    Each file of the sources counts as a syntax tree without docstrings and comments, and by its path. So rewording
    leaves every finished cell finished, and an edit that changes a computation makes it a new cell.

    Args:
        root: The folder that holds the packages.
        sources: Files and folders below `root`.

    Returns:
        16 hex digits.
    """
    digest = hashlib.sha256()
    for name in sources:
        source = root / name
        for file in sorted(source.rglob("*.py")) if source.is_dir() else [source]:
            parts = [f"\0{file.relative_to(root).as_posix()}\0"]
            _add_syntax(ast.parse(file.read_bytes()), parts)
            digest.update("".join(parts).encode())
    return digest.hexdigest()[:16]


def _add_syntax(node: Any, parts: list[str]) -> None:
    """Append a syntax tree as text, without docstrings.

    Fields without a value are left out: later Python versions add some, and the hash must not depend on the version.
    """
    if isinstance(node, ast.AST):
        parts.append(f"({type(node).__name__}")
        for name, value in ast.iter_fields(node):
            if name == "body" and isinstance(value, list):
                value = [statement for statement in value if not _is_docstring(statement)]
            if value is not None and value != []:
                parts.append(f" {name}=")
                _add_syntax(value, parts)
        parts.append(")")
    elif isinstance(node, list):
        for entry in node:
            _add_syntax(entry, parts)
            parts.append(",")
    else:
        parts.append(repr(node))


def _is_docstring(statement: ast.AST) -> bool:
    """Whether a statement is a bare string: a docstring, or the description below a constant."""
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def provenance(device: torch.device | None = None) -> dict[str, Any]:
    """Return what a reader needs to know about the machine and the versions behind a record."""
    return {
        "commit": _commit(),
        "code": code_version(),
        "device": _device_name(device) if device else None,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers")},
    }


def _commit() -> str | None:
    """Return the commit of the project's own repository, None for an installation inside another one."""
    command = ["git", "rev-parse", "--show-toplevel", "HEAD"]
    try:
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    folder, commit = shown.stdout.splitlines()
    return commit if Path(folder).resolve() == ROOT.resolve() else None


def _device_name(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"
