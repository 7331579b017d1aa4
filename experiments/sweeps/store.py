"""The results folder of a sweep: records, checkpoints and locks of its cells."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.files import write_atomically
from experiments.records.benchmarks import check_answer_files
from experiments.records.files import read_record, with_digest
from experiments.records.schema import check_record
from experiments.records.views import Record
from experiments.sweeps.locks import CellLock, LockOwner, lock_owner

_DISK_FULL_BELOW = 2**20  # free bytes


class ResultsFolderError(OSError):
    """The results folder cannot be written. The message says what to do."""


@dataclass(frozen=True)
class CellStatus:
    """The status of a cell.

    Attributes:
        state: What it is.
        record: The record of a finished or failed cell.
        owner: The process of a running cell, if it is known.
    """

    state: Literal["finished", "failed", "running", "missing"]
    record: Record | None = None
    owner: LockOwner | None = None


class RecordStore:
    """A results folder.

    It holds `records/<identity>.json` for each finished or failed cell, `work/<identity>/` while a cell trains, and
    `locks/<identity>/` while it runs.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.records = self.folder / "records"

    def prepare(self) -> None:
        """Create the folder and check that it can be written.

        Raises:
            ResultsFolderError: If it cannot, before anything has been computed.
        """
        try:
            self.records.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.records) as file:
                file.write(b"0")
        except OSError as error:
            raise self._error(error) from error

    def path(self, identity: str) -> Path:
        """Return the path of a cell's record."""
        return self.records / f"{identity}.json"

    def work(self, identity: str) -> Path:
        """Return the folder of a cell's checkpoints."""
        return self.folder / "work" / identity

    def lock(self, identity: str) -> CellLock:
        """Return the lock of a cell."""
        return CellLock(self.folder / "locks" / identity)

    def locked(self) -> Iterator[str]:
        """Return the identities of all locks, those of dead processes included."""
        return (path.name for path in sorted((self.folder / "locks").glob("[!.]*")))

    def record(self, identity: str) -> Record | None:
        """Return the record of a cell, None if there is no whole one with its files of answers."""
        try:
            record = read_record(self.path(identity))
            check_answer_files(record, self.folder)
        except (OSError, ValueError):
            return None
        return record if record["id"] == identity else None

    def status(self, identity: str) -> CellStatus:
        """Return the status of a cell."""
        record = self.record(identity)
        if record and record["status"] == "finished":
            return CellStatus("finished", record)
        if owner := lock_owner(self.folder / "locks" / identity):
            return CellStatus("running", record, owner)
        return CellStatus("failed", record) if record else CellStatus("missing")

    def write(self, record: dict[str, Any]) -> Path:
        """Write a record. A record of failure never replaces a finished one.

        Returns:
            Its path.

        Raises:
            ResultsFolderError: If it cannot be written. The file that was there before is unchanged.
            ValueError: If it holds NaN or infinity, which JSON has not, or is no record that can be read again.
        """
        path = self.path(record["id"])
        if record["status"] != "finished" and self.status(record["id"]).state == "finished":
            return path
        body = json.dumps(record, separators=(",", ":"), allow_nan=False)
        check_record(json.loads(body))
        text = with_digest(body)
        try:
            write_atomically(path, text)
        except OSError as error:
            raise self._error(error) from error
        return path

    def disk_full_error(self, error: BaseException) -> ResultsFolderError | None:
        """Return the error to raise instead, if the cause of an error is a full disk; None otherwise.

        Libraries report a full disk in different ways, and torch not at all, so the free space counts too.
        """
        causes = [error]
        while following := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(following)
        reported = any(
            getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(cause)
            for cause in causes
        )
        if reported or shutil.disk_usage(self.folder).free < _DISK_FULL_BELOW:
            return self._error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        return None

    def clean(self, identity: str) -> None:
        """Remove the checkpoints of a finished cell, and half-written records that a kill left behind."""
        shutil.rmtree(self.work(identity), ignore_errors=True)
        for temporary in self.records.glob(f".{identity}.json.*"):
            temporary.unlink(missing_ok=True)

    def require_finished(self, identity: str) -> Record:
        """Return the record of a finished cell.

        Raises:
            ResultsFolderError: If it cannot be read back as finished.
        """
        status = self.status(identity)
        if status.state != "finished" or status.record is None:
            raise ResultsFolderError(
                f"results folder '{self.folder}': the record {identity} cannot be read back; its checkpoints are kept, run "
                "the same command again"
            )
        return status.record

    def _error(self, error: OSError) -> ResultsFolderError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "free some space there, then run the same command again: it resumes"
        else:
            advice = "choose another with results=FOLDER"
        return ResultsFolderError(f"results folder '{self.folder}' cannot be written ({error.strerror}); {advice}")
