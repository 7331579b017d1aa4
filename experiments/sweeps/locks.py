"""One process a cell: a lock that is a folder, held by the one file in it.

The folder is made aside with its file and renamed into place, which a file system refuses where a lock with an owner
already lies: of several processes one gets it, and it never lies there without its owner. An owner that is seen to be
dead loses its file, whose name is never used again, so that of several processes that find it dead none can take away
the lock that another has just got.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import signal
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import psutil  # type: ignore[import-untyped]

log = logging.getLogger(__name__)
HEARTBEAT = 30.0  # seconds between signs of life
DEAD_AFTER = 300.0  # seconds without one, where the process itself cannot be seen
_SAME_START = 2.0  # seconds that clocks may have been set by between two looks at when a process began


@dataclass(frozen=True)
class Owner:
    """A process: `started` is when it began and `since` when it took the lock, both in seconds since 1970."""

    host: str
    pid: int
    started: float
    since: float

    @classmethod
    def this_process(cls) -> Owner:
        return cls(_host(), os.getpid(), psutil.Process().create_time(), time.time())

    def __str__(self) -> str:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host.partition('/')[0]} since {began}"

    def runs(self) -> bool | None:
        """Whether the process is there; None where this cannot be seen from here."""
        if self.host != _host():
            return None
        try:
            process = psutil.Process(self.pid)
            there = abs(process.create_time() - self.started) < _SAME_START
            return there and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def _host() -> str:
    """The host's name and its numbering of processes: containers of one name may count them apart."""
    space = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}/{os.stat(space).st_ino if space.exists() else 0}"


class Lock:
    """A lock at `folder`, for `with`: entering tells whether this process got it. A thread then gives signs of life.

    Should another process take it all the same, having seen none for `DEAD_AFTER` seconds (this one was suspended, say),
    the main thread is interrupted as by Ctrl-C; a process that is deaf to that, as what a script puts into the background
    with `&` is, is terminated.

    Raises:
        OSError: on entering, where no folder can be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mine = folder / f"{uuid.uuid4().hex}.json"
        self._left = threading.Event()
        self.held = False

    def __enter__(self) -> bool:
        self.held = self._take()
        if self.held:
            threading.Thread(target=self._beat, daemon=True).start()
        return self.held

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.held:
            self._left.set()
            self._mine.unlink(missing_ok=True)
            _remove_if_empty(self.folder)
            self.held = False

    def _take(self) -> bool:
        aside = self.folder.with_name(f".{self._mine.stem}")
        aside.mkdir(parents=True)
        try:
            sign = aside / self._mine.name
            sign.write_text(json.dumps(asdict(Owner.this_process())) + "\n")
            while True:
                try:
                    os.rename(aside, self.folder)
                    return True
                except OSError as error:
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                        raise
                os.utime(sign)
                for path in _signs(self.folder):
                    if _alive(path, sign.stat().st_mtime):
                        return False
                    path.unlink(missing_ok=True)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _beat(self) -> None:
        while not self._left.wait(HEARTBEAT):
            try:
                os.utime(self._mine)
            except FileNotFoundError:
                if not self._left.is_set():
                    log.error("%s has been taken by another process: no sign of life was seen for long", self.folder)
                    deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
                    stop = signal.SIGTERM if deaf else signal.SIGINT
                    signal.pthread_kill(threading.main_thread().ident or 0, stop)
                return
            except OSError as error:  # a file system that is away for a while
                log.warning("%s: %s", self._mine, error.strerror)


def owner(folder: Path) -> Owner | None:
    """The living owner of the lock at `folder`, None where it is free."""
    for path in _signs(folder):
        if _alive(path, time.time()):
            return _read(path)
    return None


def _signs(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in os.listdir(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read(path: Path) -> Owner | None:
    try:
        return Owner(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _alive(path: Path, now: float) -> bool:
    """Whether the owner in a lock's file lives: its process is there, or, where that cannot be seen, has lately given a
    sign of life. `now` is the file system's time."""
    holder = _read(path)
    runs = holder.runs() if holder else None
    if runs is not None:
        return runs
    try:
        return now - path.stat().st_mtime < DEAD_AFTER
    except FileNotFoundError:
        return False


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # taken again already
        folder.rmdir()
