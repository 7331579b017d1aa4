"""Record files, and folders of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.config.renamed_keys import migrate
from experiments.records.benchmarks import check_answer_files
from experiments.records.latency import latency_key, load_latencies
from experiments.records.schema import check_record
from experiments.records.views import (
    Record,
    configuration_key,
    failure_reason,
    model_files,
    record_label,
    start_time,
)

_DIGEST = ',"digest":"'


@dataclass(frozen=True)
class MissingEntry:
    """Something that a report should have and has not, with the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Records:
    """The records of one folder.

    Attributes:
        finished: Finished records, by identity.
        failed: Failed records, by identity.
        unreadable: Files that are no record.
        superseded: Records that a newer one of the same configuration and seed replaces. Reports name them only.
    """

    finished: tuple[Record, ...]
    failed: tuple[Record, ...]
    unreadable: tuple[MissingEntry, ...]
    superseded: tuple[MissingEntry, ...]

    @property
    def missing(self) -> tuple[MissingEntry, ...]:
        """Failed cells, then files that could not be read."""
        failed = (MissingEntry(record_label(record), failure_reason(record)) for record in self.failed)
        return (*failed, *self.unreadable)


def load_records(folder: Path) -> Records:
    """Read every `*.json` in a folder.

    Of finished records whose configurations differ in nothing but `IGNORED_SETTINGS`, and whose data and files of the
    model are the same, the newest counts. A failed record names neither: it replaces failed ones alone, and any newer
    finished one of its configuration replaces it. A latency that was measured for a record's model, in the results
    folder above, is added to its `cost`.

    Args:
        folder: The folder `records` of a results folder.

    Raises:
        OSError: If the folder does not exist, cannot be read or holds no `*.json` file.
        ValueError: If no file is a record, or the file of latencies is not one.
    """
    paths = _record_paths(folder)
    latencies = load_latencies(folder.parent)
    newest: dict[tuple[str, ...], Record] = {}
    unreadable, superseded = [], []
    for path in paths:
        try:
            record = read_record(path)
            check_answer_files(record, folder.parent)
        except (OSError, ValueError) as error:
            unreadable.append(MissingEntry(path.name, str(error)))
            continue
        if record.get("cost") and (measured := latencies.get(latency_key(record["config"]))):
            record = {**record, "cost": {**record["cost"], **measured}}
        key = _key(record)
        if (other := newest.get(key)) is not None:
            older, record = sorted((other, record), key=_age)
            superseded.append(_replaced(older, record))
        newest[key] = record
    if not newest:
        count = f"its {len(paths)} files" if len(paths) > 1 else "its one file"
        raise ValueError(
            f"no record in {folder} can be read, of {count}; {unreadable[0].name}: {unreadable[0].reason}; run "
            "`python -m experiments.run` or name another folder"
        )
    current = sorted(newest.values(), key=lambda record: record["id"])
    finished = tuple(record for record in current if record["status"] == "finished")
    latest = {configuration_key(record["config"]): record for record in sorted(finished, key=_age)}
    failed = []
    for record in current:
        if record["status"] == "failed":
            later = latest.get(configuration_key(record["config"]))
            if later is not None and _age(later) > _age(record):
                superseded.append(_replaced(record, later))
            else:
                failed.append(record)
    return Records(
        finished=finished,
        failed=tuple(failed),
        unreadable=tuple(unreadable),
        superseded=tuple(sorted(superseded, key=lambda entry: entry.name)),
    )


def select_records(records: Records, selected: Iterable[Record]) -> Records:
    """Return `records` with the selected ones alone. Files that could not be read stay listed."""
    ids = {record["id"] for record in selected}
    finished, failed = (tuple(r for r in part if r["id"] in ids) for part in (records.finished, records.failed))
    return replace(records, finished=finished, failed=failed, superseded=())


def with_digest(body: str) -> str:
    """Return the text of a record file: a JSON object with a digest of its text as the last entry.

    Args:
        body: The object as JSON text, without line breaks at its end.
    """
    return f'{body[:-1]}{_DIGEST}{hashlib.sha256(body.encode()).hexdigest()}"}}\n'


def read_record(path: Path) -> Record:
    """Read and check one record file. Settings get the names that they have today.

    Raises:
        ValueError: If it is not a whole record, in one line.
        OSError: If it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        record = json.loads(text)
    except UnicodeDecodeError:
        raise ValueError("not a text file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON (truncated?): {error.msg} at line {error.lineno}") from None
    body, digest, _ = text.rpartition(_DIGEST)
    if digest and text != with_digest(f"{body}}}"):
        raise ValueError("changed since it was written; remove it and run its cell again")
    check_record(record)
    return record | {"config": migrate(record["config"])}


def _record_paths(folder: Path) -> list[Path]:
    """Return the `*.json` files of a folder, and raise an OSError in one line if there are none."""
    advice = "run `python -m experiments.run` or name another folder"
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".json")
    except FileNotFoundError:
        if not folder.parent.exists():
            advice = f"there is no folder {folder.parent}; {advice}"
        elif any(folder.parent.glob("*.json")):
            advice = f"name the folder that holds {folder.name}/, not one inside it"
        raise FileNotFoundError(f"no records in {folder}: {advice}") from None
    except OSError as error:
        raise OSError(f"records in {folder} cannot be read ({error.strerror}): {advice}") from None
    if not paths:
        raise FileNotFoundError(f"no records in {folder}: {advice}")
    return paths


def _key(record: Record) -> tuple[str, ...]:
    """Return a key that is equal for records of which the newest counts."""
    config = configuration_key(record["config"])
    if record["status"] == "failed":
        return "failed", config
    return config, record["data"]["fingerprint"], json.dumps(model_files(record))


def _replaced(older: Record, newer: Record) -> MissingEntry:
    return MissingEntry(f"{record_label(older)} ({older['id']})", f"replaced by the newer {newer['id']}")


def _age(record: Record) -> tuple[str, str]:
    return start_time(record), record["id"]
