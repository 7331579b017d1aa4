"""What tells that files have been written anew since this process read them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


def stamps(paths: Iterable[str | None]) -> list[tuple[str, int, int]]:
    """Name, size in bytes and time in nanoseconds of the files at these paths or right inside them; of what is no path,
    such as a name on the model hub, nothing."""
    named = [Path(path) for path in paths if path]
    files = [file for path in named for file in ([path] if path.is_file() else sorted(path.glob("*")))]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


ASSETS = Path(__file__).parent / "assets"


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
