import errno
import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from experiments.config.identity import identity
from experiments.config.schema import Config
from experiments.files import write_atomically
from experiments.records.files import read
from experiments.sweeps.store import ResultsError, Store
from tests.experiments.sweeps.run_sweep import FOUND

BASE = {"schema": 1, "id": "ab", "experiment": "table", "name": "a cell, seed 0", "config": {"seed": 0}}
FAILED = BASE | {"status": "failed", "error": "ValueError: no"}
FINISHED = BASE | FOUND | {"status": "finished", "provenance": {"started": "2026-01-01T00:00:00+00:00"}}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(tmp_path)
    found.prepare()
    return found


def test_a_cell_stands_as_its_record_says(store):
    assert store.standing("ab").state == "missing"
    store.write(FAILED)
    assert store.standing("ab").state == "failed"
    assert store.standing("ab").record["error"] == "ValueError: no"
    store.write(FINISHED)
    assert store.standing("ab").state == "finished"
    store.write(FAILED)
    assert store.standing("ab").record["accuracy"] == {"image": "0110"}


def test_a_cell_runs_while_its_lock_is_held(store):
    with store.lock("ab"):
        assert store.standing("ab").state == "running"
        assert store.standing("ab").owner.pid == os.getpid()
        assert list(store.locked()) == ["ab"]
    assert store.standing("ab").state == "missing"
    assert list(store.locked()) == []


@pytest.mark.parametrize("cut", [0, 1, 40, -40, -2])
def test_a_truncated_record_is_none(store, cut):
    text = store.write(FINISHED).read_text()
    store.path("ab").write_text(text[:cut])
    assert store.standing("ab").state == "missing"
    store.write(FAILED)  # nothing finished is lost
    assert store.standing("ab").state == "failed"


def test_a_changed_record_is_none_though_it_is_json(store):
    text = store.write(FINISHED).read_text()
    store.path("ab").write_text(text.replace("0110", "1110"))
    assert json.loads(store.path("ab").read_text())["accuracy"] == {"image": "1110"}
    assert store.standing("ab").state == "missing"
    with pytest.raises(ValueError, match="changed since it was written"):
        read(store.path("ab"))


def test_a_record_under_another_name_is_none(store):
    store.write(FINISHED).rename(store.path("cd"))
    assert store.standing("cd").state == "missing"


def test_bytes_that_are_no_text(store):
    store.write(FINISHED).write_bytes(os.urandom(400))
    assert store.standing("ab").state == "missing"


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def cut(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", cut)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_no_number_is_written_that_json_does_not_have(store):
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write(FINISHED | {"x": float("nan")})
    assert not list(store.records.iterdir())


def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match=r"results folder '.*file/results' cannot be written .*results=FOLDER"):
        Store(tmp_path / "file" / "results").prepare()


def test_a_full_disk_says_what_to_do_and_leaves_no_half_record(store, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResultsError, match=r"No space left on device\); make room there, then run the same command"):
        store.write(FINISHED)
    assert not list(store.records.iterdir())


def test_a_full_disk_is_known_by_what_libraries_say_of_it(store):
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = OSError(errno.ENOSPC, "anything")
    assert "make room" in str(store.full(wrapped))
    assert store.full(Exception("I/O error: No space left on device (os error 28)"))
    assert store.full(RuntimeError("shapes differ")) is None


def test_identity_tells_what_matters_from_what_does_not():
    def named(**changes) -> str:
        return identity(asdict(Config(model=None, data=None, **changes)), "data", "code")

    assert named() == named(results="elsewhere") == named(device="cuda") == named(batch_size=1) == named(name="other")
    assert named() != named(seed=1)
    config = asdict(Config(model=None, data=None))
    assert len({identity(config, "a", "c"), identity(config, "b", "c"), identity(config, "a", "d")}) == 3
