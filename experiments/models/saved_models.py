"""The folder that `save=FOLDER` writes: it is checked before a cell starts, written whole, and never takes others' files."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

if TYPE_CHECKING:  # a sweep whose cells are all finished does not wait for torch
    from transformers import PreTrainedModel, ProcessorMixin

MARKER = "saved_cell.json"
"""The file of a saved model that names its cell, and the files that were written."""


class SaveError(OSError):
    """A model cannot be saved. The message says what to do."""


def check_save_folder(folder: Path, cell_id: str) -> None:
    """Check that a model can be saved to a folder, before anything is computed.

    Args:
        folder: A new folder, an empty one, or one that an earlier `save_model` of the same cell wrote.
        cell_id: The identity of the cell.

    Raises:
        SaveError: If the folder is a file, holds other files or the model of another cell, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise SaveError(f"save: '{folder}' is a file; name a folder")
    if others := _other_files(folder):
        raise SaveError(f"save: '{folder}' holds other files ({others[0]}); name a new or an empty folder")
    if (saved := (_marker(folder) or {}).get("id", cell_id)) != cell_id:
        raise SaveError(
            f"save: '{folder}' holds the model of cell {saved}, and this is cell {cell_id}: settings, data or code differ; "
            "name another folder, or remove this one"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}."):
            pass
    except OSError as error:
        raise _not_writable(folder, error) from error


def is_saved(folder: Path, cell_id: str) -> bool:
    """Return whether a folder holds the model of a cell."""
    return (_marker(folder) or {}).get("id") == cell_id


def save_model(model: PreTrainedModel, processor: ProcessorMixin, adapter: Path, folder: Path, cell_id: str) -> None:
    """Save a model, its processor and a trained adapter.

    They are written to a temporary folder that is then renamed, so that the folder is always complete.

    Args:
        model: The model.
        processor: Its processor.
        adapter: The folder of the adapter; if it does not exist, none is saved.
        folder: The target, which `check_save_folder` accepts.
        cell_id: The identity of the cell, for `is_saved` and `check_save_folder`.

    Raises:
        SaveError: If it cannot be written. What the folder held before is unchanged.
    """
    temporary = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        if adapter.is_dir():
            shutil.copytree(adapter, temporary / adapter.name)
        files = sorted(path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file())
        (temporary / MARKER).write_text(json.dumps({"id": cell_id, "files": [*files, MARKER]}, indent=1) + "\n")
        check_save_folder(folder, cell_id)  # training takes long: somebody may have put files there since
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except SaveError:
        raise
    except (OSError, SafetensorError) as error:
        raise _not_writable(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _marker(folder: Path) -> dict[str, object] | None:
    try:
        marker = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) else None


def _other_files(folder: Path) -> list[str]:
    """Return the files of a folder that no `save_model` wrote."""
    written = (_marker(folder) or {}).get("files", [])
    assert isinstance(written, list)
    present = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(set(present) - set(written))


def _not_writable(folder: Path, error: OSError | SafetensorError) -> SaveError:
    reason = getattr(error, "strerror", None) or error
    return SaveError(f"save: '{folder}' cannot be written ({reason}); choose another with save=FOLDER")
