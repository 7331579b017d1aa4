"""Locks, so that each cell runs in one process at a time.

A lock is a folder that holds one file, named after its owner. A process makes the folder aside, with its file in it, and
renames it into place; a file system refuses that if a lock with a file is there. So one of several processes gets the
lock, and a lock never exists without its owner. A process that finds a dead owner removes the owner's file. File names
are never reused, so that none of several such processes can remove a lock that another has just taken.

filelock's SoftFileLease (4.3) does the same on one machine, but a lock outlives its owner in two cases that sweeps meet:
an owner that was killed and whose parent has not yet collected it, and an owner on another machine, whose lease a new
process must watch for its whole duration before it may take it.
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
HEARTBEAT = 30.0  # seconds between two heartbeats of an owner
DEAD_AFTER = 300.0  # seconds without a heartbeat after which an owner on another machine counts as dead
_SAME_START = 2.0  # seconds by which two readings of a process's start may differ: the clock may have been set


@dataclass(frozen=True)
class LockOwner:
    """The process that holds a lock.

    Attributes:
        host: The machine and the PID namespace.
        pid: The process ID.
        started: When the process began, in seconds since 1970.
        since: When it took the lock, in seconds since 1970.
    """

    host: str
    pid: int
    started: float
    since: float

    @classmethod
    def this_process(cls) -> LockOwner:
        """Return this process as an owner, from now on."""
        return cls(_host(), os.getpid(), psutil.Process().create_time(), time.time())

    def __str__(self) -> str:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host.partition('/')[0]} since {began}"

    def runs(self) -> bool | None:
        """Return whether the process runs, None if it is on another machine."""
        if self.host != _host():
            return None
        try:
            process = psutil.Process(self.pid)
            same_process = abs(process.create_time() - self.started) < _SAME_START
            return same_process and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def _host() -> str:
    """Return the machine's name and PID namespace: containers of one name may number processes apart."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}/{os.stat(namespace).st_ino if namespace.exists() else 0}"


class CellLock:
    """The lock of one cell, as a context manager that yields whether this process got it.

    A thread renews the heartbeat. If another process takes the lock all the same, because it saw no heartbeat for
    `DEAD_AFTER` seconds (this one was suspended, for example), the main thread is interrupted as by Ctrl-C. A process
    that ignores Ctrl-C, as a shell script's background processes do, is terminated.

    Args:
        folder: The folder of the lock.

    Raises:
        OSError: On entering, if the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / f"{uuid.uuid4().hex}.json"
        self._released = threading.Event()
        self.held = False

    def __enter__(self) -> bool:
        self.held = self._take()
        if self.held:
            threading.Thread(target=self._renew, daemon=True).start()
        return self.held

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.held:
            self._released.set()
            self._file.unlink(missing_ok=True)
            _remove_if_empty(self.folder)
            self.held = False

    def _take(self) -> bool:
        temporary = self.folder.with_name(f".{self._file.stem}")
        temporary.mkdir(parents=True)
        try:
            file = temporary / self._file.name
            file.write_text(json.dumps(asdict(LockOwner.this_process())) + "\n")
            while True:
                try:
                    os.rename(temporary, self.folder)
                    return True
                except OSError as error:
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                        raise
                os.utime(file)  # the file system's time, which may differ from this machine's
                for path in _owner_files(self.folder):
                    if _is_alive(path, file.stat().st_mtime):
                        return False
                    path.unlink(missing_ok=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _renew(self) -> None:
        while not self._released.wait(HEARTBEAT):
            try:
                os.utime(self._file)
            except FileNotFoundError:
                if not self._released.is_set():
                    log.error("%s was taken by another process, which saw no heartbeat for long", self.folder)
                    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
                    signal.pthread_kill(
                        threading.main_thread().ident or 0, signal.SIGTERM if ignored else signal.SIGINT
                    )
                return
            except OSError as error:  # a network file system may be gone for a while
                log.warning("%s: %s", self._file, error.strerror)


def lock_owner(folder: Path) -> LockOwner | None:
    """Return the living owner of a lock, None if the lock is free."""
    for path in _owner_files(folder):
        if _is_alive(path, time.time()):
            return _read_owner(path)
    return None


def _owner_files(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in os.listdir(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read_owner(path: Path) -> LockOwner | None:
    try:
        return LockOwner(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _is_alive(path: Path, now: float) -> bool:
    """Return whether the owner in a lock's file lives.

    On this machine its process decides, elsewhere its last heartbeat.

    Args:
        path: The file.
        now: The file system's time.
    """
    owner = _read_owner(path)
    runs = owner.runs() if owner else None
    if runs is not None:
        return runs
    try:
        return now - path.stat().st_mtime < DEAD_AFTER
    except FileNotFoundError:
        return False


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # another process has taken the lock again
        folder.rmdir()
