"""The benchmarks of lmms-eval as a test split: what identifies them before lmms-eval is imported."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from experiments.data.samples import Split, fingerprint
from experiments.files import file_sha256
from experiments.provenance import ROOT, code_version

PLUGIN = "experiments/lmms_eval_model"
"""The folder of the code that runs the tasks, and of the project's own tasks."""
_TASK_SUFFIXES = (".yaml", ".yml", ".py")


class _TaskLoader(yaml.SafeLoader):
    """Reads a task file without its functions, which other packages may hold."""


_TaskLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


def load_benchmarks(include: Sequence[str]) -> Split:
    """Return the test split of benchmarks. lmms-eval makes its samples when the model answers them.

    The fingerprint covers lmms-eval's version, this project's code and task files for it, the task files of `include`,
    and the local data sets that they name. Data sets of the model hub, and videos in HF_HOME, count by their names alone.

    Args:
        include: Folders with further task files.

    Raises:
        FileNotFoundError: If a folder is missing.
        ImportError: If lmms-eval is not installed.
        ValueError: If a task file is not YAML.
    """
    try:
        harness = version("lmms-eval")
    except PackageNotFoundError:
        raise ImportError(
            "data=lmms: lmms-eval is not installed in this environment; the section Install of docs/benchmarks.md makes one"
        ) from None
    folders = [ROOT / PLUGIN / "tasks", *map(Path, include)]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"data.include: no folder '{folder}'")
    code = code_version(sources=(PLUGIN,))
    return Split("test", (), fingerprint("lmms", harness, code, *map(_task_files_digest, folders)))


def _task_files_digest(folder: Path) -> str:
    """Hash the task files of a folder by their content and path in it, and the local data sets that they name."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.suffix in _TASK_SUFFIXES):
        digest.update(f"{file.relative_to(folder).as_posix()} {file_sha256(file)}\n".encode())
        for source in _local_data(file) if file.suffix != ".py" else ():
            for data in sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]:
                digest.update(f"{data.relative_to(source).as_posix()} {file_sha256(data)}\n".encode())
    return digest.hexdigest()


def _local_data(file: Path) -> Iterator[Path]:
    """Yield the files and folders of this machine that a task file names as its data."""
    try:
        task = yaml.load(file.read_text(encoding="utf-8"), _TaskLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"data.include: {file} is not YAML: {' '.join(str(error).split())}") from None
    if isinstance(task, dict):
        options = task.get("dataset_kwargs")
        named = [task.get("dataset_path"), options.get("data_files") if isinstance(options, dict) else None]
        yield from (path for text in _texts(named) if (path := Path(text).expanduser()).exists())


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts(list(value.values()))
    elif isinstance(value, Iterable):
        for part in value:
            yield from _texts(part)
