"""Files: writing them whole, and noticing that they changed."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
"""The folder of the models that ship with the project."""


def write_atomically(path: Path, text: str) -> None:
    """Write a text file. A reader finds the old file or the whole new one, also after a kill.

    Raises:
        OSError: If it cannot be written.
    """
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as temporary:
        try:
            temporary.write(text)
            temporary.flush()
            os.fsync(temporary.fileno())
        except BaseException:
            os.unlink(temporary.name)
            raise
    os.chmod(temporary.name, 0o644)
    os.replace(temporary.name, path)


def file_stamps(paths: Iterable[str | None]) -> list[tuple[str, int, int]]:
    """Return name, size in bytes and modification time in nanoseconds of files, to notice when they change.

    Args:
        paths: Files, and folders whose direct files are taken. Anything else, such as a hub name, gives nothing.
    """
    given = [Path(path) for path in paths if path]
    files = [file for path in given for file in ([path] if path.is_file() else sorted(path.glob("*")))]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def file_sha256(file: Path) -> str:
    """Return the SHA-256 hash of a file's content, as `sha256sum` prints it.

    Raises:
        OSError: If it cannot be read.

    Example:
        >>> _ = Path("a.txt").write_text("red")
        >>> file_sha256(Path("a.txt"))[:16]
        'b1f51a511f1da0cd'
    """
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()
