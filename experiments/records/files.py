"""TODO"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.records import latency
from experiments.records.schema import check
from experiments.records.views import Record, configuration, describe, failure, started

# Settings that came after some records, which were made as if they had had these values.
_YOUNGER = {"train": {"prefusion_learning_rate": None}}


_SEAL = ',"digest":"'


@dataclass(frozen=True)
class Hole:
    """Something that should be in the report and is not, with the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Records:
    """What a folder of records holds.

    `superseded` are older records of a configuration and seed that a newer record has replaced (the code or the data
    changed in between); they are named in the report and used nowhere.
    """

    finished: tuple[Record, ...]
    failed: tuple[Record, ...]
    unreadable: tuple[Hole, ...]
    superseded: tuple[Hole, ...]

    @property
    def holes(self) -> tuple[Hole, ...]:
        """All that is missing: failed cells first, then files that could not be read."""
        return (*(Hole(describe(record), failure(record)) for record in self.failed), *self.unreadable)


def load(folder: Path) -> Records:
    """Read every `*.json` in `folder`; the records come in the order of their identities. A latency that was measured of
    a record's model, and lies beside `folder`, is in its `cost`.

    Of records whose configurations differ in nothing but `INCIDENTAL` the newest counts.

    Raises:
        FileNotFoundError: if `folder` does not exist or holds no `*.json` file.
        ValueError: if what lies beside it as latencies is none.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise FileNotFoundError(f"no records in {folder}: make some with `python -m experiments.run`")
    latencies = latency.load(folder.parent)
    newest: dict[str, Record] = {}
    unreadable, superseded = [], []
    for path in paths:
        try:
            record = read(path)
        except (OSError, ValueError) as error:
            unreadable.append(Hole(path.name, str(error)))
            continue
        if record.get("cost") and (timed := latencies.get(latency.timed_part(record["config"]))):
            record = {**record, "cost": {**record["cost"], **timed}}
        key = configuration(record["config"])
        other = newest.get(key)
        if other is not None:
            older, record = sorted((other, record), key=_age)
            superseded.append(Hole(f"{describe(older)} ({older['id']})", f"replaced by the newer {record['id']}"))
        newest[key] = record
    kept = sorted(newest.values(), key=lambda record: record["id"])
    return Records(
        finished=tuple(record for record in kept if record["status"] == "finished"),
        failed=tuple(record for record in kept if record["status"] == "failed"),
        unreadable=tuple(unreadable),
        superseded=tuple(sorted(superseded, key=lambda hole: hole.name)),
    )


def chosen(records: Records, some: Iterable[Record]) -> Records:
    """Some of the records alone; files that could not be read stay named."""
    ids = {record["id"] for record in some}
    finished, failed = (tuple(r for r in part if r["id"] in ids) for part in (records.finished, records.failed))
    return replace(records, finished=finished, failed=failed, superseded=())


def sealed(body: str) -> str:
    """A record file's text, of a JSON object's: with a digest at its end that tells when it has been changed since."""
    return f'{body[:-1]}{_SEAL}{hashlib.sha256(body.encode()).hexdigest()}"}}\n'


def read(path: Path) -> Record:
    """Read and check one record file. Raises ValueError with one line that says what is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8")
        record = json.loads(text)
        body, seal, _ = text.rpartition(_SEAL)
        if seal and text != sealed(f"{body}}}"):
            raise ValueError("changed since it was written; remove it and run its cell again")
    except UnicodeDecodeError:
        raise ValueError("not a text file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON (truncated?): {error.msg} at line {error.lineno}") from None
    check(record)
    for part, settings in _YOUNGER.items():
        if isinstance(said := record["config"].get(part), dict):
            record["config"][part] = settings | said
    return record


def _age(record: Record) -> tuple[str, str]:
    return started(record), record["id"]
