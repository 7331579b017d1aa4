"""The results folder: the status of a cell, records that are damaged, and disks that cannot be written."""

import errno
import json
import os
from pathlib import Path

import pytest

from experiments.files import write_atomically
from experiments.records.files import read_record
from experiments.sweeps.runner import run_if_needed
from experiments.sweeps.store import RecordStore, ResultsFolderError
from tests.experiments.sweeps.run_sweep import MINIMAL_MEASUREMENT, tiny_cell

BASE = {"schema": 1, "id": "ab", "experiment": "table", "name": "a cell, seed 0", "config": {"seed": 0}}
FAILED = BASE | {"status": "failed", "error": "ValueError: no"}
FINISHED = BASE | MINIMAL_MEASUREMENT | {"status": "finished", "provenance": {"started": "2026-01-01T00:00:00+00:00"}}


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    """A results folder that can be written."""
    prepared = RecordStore(tmp_path)
    prepared.prepare()
    return prepared


def test_status_follows_the_record(store):
    assert store.status("ab").state == "missing"
    store.write(FAILED)
    assert store.status("ab").state == "failed"
    assert store.status("ab").record["error"] == "ValueError: no"
    store.write(FINISHED)
    assert store.status("ab").state == "finished"


def test_write_of_failed_record_leaves_finished_record(store):
    store.write(FINISHED)
    store.write(FAILED)
    assert store.status("ab").record["accuracy"] == {"image": "0110"}


def test_status_while_the_lock_is_held_is_running(store):
    with store.lock("ab"):
        assert store.status("ab").state == "running"
        assert store.status("ab").owner.pid == os.getpid()
        assert list(store.locked()) == ["ab"]
    assert store.status("ab").state == "missing"
    assert list(store.locked()) == []


@pytest.mark.parametrize("length", [0, 1, 40, -40, -2])
def test_status_of_truncated_record_is_missing(store, length):
    text = store.write(FINISHED).read_text()
    store.path("ab").write_text(text[:length])
    assert store.status("ab").state == "missing"
    store.write(FAILED)  # no finished record is lost
    assert store.status("ab").state == "failed"


def test_status_of_changed_record_is_missing_though_it_is_json(store):
    text = store.write(FINISHED).read_text()
    store.path("ab").write_text(text.replace("0110", "1110"))
    assert json.loads(store.path("ab").read_text())["accuracy"] == {"image": "1110"}
    assert store.status("ab").state == "missing"
    with pytest.raises(ValueError, match="changed since it was written"):
        read_record(store.path("ab"))


def test_status_of_record_under_another_name_is_missing(store):
    store.write(FINISHED).rename(store.path("cd"))
    assert store.status("cd").state == "missing"


def test_status_of_random_bytes_is_missing(store):
    store.write(FINISHED).write_bytes(os.urandom(400))
    assert store.status("ab").state == "missing"


def test_write_atomically_when_interrupted_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_write_of_nan_raises_and_leaves_no_file(store):
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write(FINISHED | {"x": float("nan")})
    assert not list(store.records.iterdir())


def test_write_of_what_no_record_may_hold_raises_and_leaves_no_file(store):
    data = FINISHED["data"] | {"kinds": [0, "count", "count", "count"]}
    with pytest.raises(ValueError, match=r"data\.kinds\[0\].* found 0"):
        store.write(FINISHED | {"data": data})
    assert not list(store.records.iterdir())


@pytest.mark.parametrize("record", [None, FAILED, FINISHED], ids=["missing", "failed", "unreadable"])
def test_require_finished_of_any_other_cell_raises(store, record):
    if record:
        path = store.write(record)
    if record is FINISHED:
        assert store.require_finished("ab")["accuracy"] == {"image": "0110"}
        path.write_text(path.read_text()[:40])
    with pytest.raises(ResultsFolderError, match=r"results folder .* record ab cannot be read back"):
        store.require_finished("ab")


def test_prepare_of_folder_that_cannot_be_made_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsFolderError, match=r"results folder '.*file/results' .*results=FOLDER"):
        RecordStore(tmp_path / "file" / "results").prepare()


def test_write_to_full_disk_raises_with_advice_and_leaves_no_file(store, monkeypatch):
    def fill_disk(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fill_disk)
    with pytest.raises(ResultsFolderError, match=r"No space left on device\).*run the same command again"):
        store.write(FINISHED)
    assert not list(store.records.iterdir())


def test_disk_full_error_recognises_a_full_disk_by_cause_and_by_message(store):
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = OSError(errno.ENOSPC, "anything")
    assert str(store.folder) in str(store.disk_full_error(wrapped))
    assert store.disk_full_error(Exception("I/O error: No space left on device (os error 28)"))


def test_disk_full_error_of_another_error_is_none(store):
    assert store.disk_full_error(RuntimeError("shapes differ")) is None


def test_clean_removes_checkpoints_and_half_written_records(store):
    path = store.write(FINISHED)
    store.work("ab").mkdir(parents=True)
    temporary = path.with_name(f".{path.name}.x1")
    temporary.write_text("{")
    store.clean("ab")
    assert not store.work("ab").exists()
    assert not temporary.exists()
    assert store.status("ab").state == "finished"


def test_run_if_needed_whose_record_is_damaged_at_once_keeps_the_checkpoints(tmp_path, monkeypatch):
    cell = tiny_cell(tmp_path)
    checkpoint = RecordStore(tmp_path).work(cell.id) / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    monkeypatch.setattr(
        "experiments.sweeps.store.write_atomically", lambda path, text: write_atomically(path, text[:-40])
    )
    with pytest.raises(ResultsFolderError, match=f"{cell.id} cannot be read back"):
        run_if_needed(cell, record_input_errors=True)
    assert checkpoint.is_dir()
