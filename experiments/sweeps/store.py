"""Records on disk: one JSON file a cell, named by the cell's identity, whole or not there at all."""

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
from experiments.records.files import read, sealed
from experiments.records.views import Record
from experiments.sweeps.locks import Lock, Owner, owner

_NO_SPACE = 2**20  # bytes


class ResultsError(OSError):
    """The results folder cannot take what is to be written. The message says what to do."""


@dataclass(frozen=True)
class Standing:
    """How a cell stands: `record` is there for one that is finished or failed, `owner` for one that is running."""

    state: Literal["finished", "failed", "running", "missing"]
    record: Record | None = None
    owner: Owner | None = None


class Store:
    """The results folder: `records/<identity>.json`; `work/<identity>/` while a cell trains, `locks/<identity>/` while it
    runs."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.records = self.folder / "records"

    def prepare(self) -> None:
        """Make the folder.

        Raises:
            ResultsError: if it cannot be made or written, before anything has been computed.
        """
        try:
            self.records.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.records) as file:
                file.write(b"0")
        except OSError as error:
            raise self._error(error) from error

    def path(self, identity: str) -> Path:
        return self.records / f"{identity}.json"

    def work(self, identity: str) -> Path:
        return self.folder / "work" / identity

    def lock(self, identity: str) -> Lock:
        return Lock(self.folder / "locks" / identity)

    def locked(self) -> Iterator[str]:
        """The cells whose locks lie there, of the living and of the dead."""
        return (path.name for path in sorted((self.folder / "locks").glob("[!.]*")))

    def record(self, identity: str) -> Record | None:
        """The record of a cell, None where there is none that is whole."""
        try:
            record = read(self.path(identity))
        except (OSError, ValueError):
            return None
        return record if record["id"] == identity else None

    def standing(self, identity: str) -> Standing:
        record = self.record(identity)
        if record and record["status"] == "finished":
            return Standing("finished", record)
        if runs := owner(self.folder / "locks" / identity):
            return Standing("running", record, runs)
        return Standing("failed", record) if record else Standing("missing")

    def write(self, record: dict[str, Any]) -> Path:
        """Write a record. One of failure leaves a finished one as it is.

        Raises:
            ResultsError: if it cannot be written; what was there before then still is.
            ValueError: if it holds what JSON does not have.
        """
        path = self.path(record["id"])
        if record["status"] != "finished" and self.standing(record["id"]).state == "finished":
            return path
        text = sealed(json.dumps(record, separators=(",", ":"), allow_nan=False))
        try:
            write_atomically(path, text)
        except OSError as error:
            raise self._error(error) from error
        return path

    def full(self, error: BaseException) -> ResultsError | None:
        """What to say instead of an error that came of a full disk, None for any other.

        Libraries say it in ways of their own; torch does not say it at all, so the disk is looked at too.
        """
        causes = [error]
        while following := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(following)
        said = any(
            getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(cause)
            for cause in causes
        )
        if said or shutil.disk_usage(self.folder).free < _NO_SPACE:
            return self._error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        return None

    def clean(self, identity: str) -> None:
        """Remove what a finished cell trained in, and what a kill left of its record's writing."""
        shutil.rmtree(self.work(identity), ignore_errors=True)
        for aside in self.records.glob(f".{identity}.json.*"):
            aside.unlink(missing_ok=True)

    def _error(self, error: OSError) -> ResultsError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what_to_do = "make room there, then run the same command again: it takes up where this one stopped"
        else:
            what_to_do = "choose another with results=FOLDER"
        return ResultsError(f"results folder '{self.folder}' cannot be written ({error.strerror}); {what_to_do}")
