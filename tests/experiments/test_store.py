import json
import os
from dataclasses import asdict

import pytest

from experiments.config import Config, identity
from experiments.store import Store, write_atomically


def test_a_record_is_whole_or_not_there(tmp_path):
    store = Store(tmp_path)
    assert not store.finished("ab")
    store.path("ab").write_text('{"status": "fini')
    assert not store.finished("ab")
    store.write({"id": "ab", "status": "finished"})
    assert store.finished("ab")
    assert json.loads(store.path("ab").read_text())["id"] == "ab"
    store.write({"id": "cd", "status": "failed"})
    assert not store.finished("cd")


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


def test_no_number_is_written_that_json_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        Store(tmp_path).write({"id": "ab", "x": float("nan")})
    assert not list(Store(tmp_path).records.iterdir())


def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match=r"results folder '.*file/results' cannot be written"):
        Store(tmp_path / "file" / "results")


def test_identity_tells_what_matters_from_what_does_not():
    def named(**changes) -> str:
        return identity(asdict(Config(model=None, data=None, **changes)), "data", "code")

    assert named() == named(results="elsewhere") == named(device="cuda") == named(batch_size=1)
    assert len({named(), named(seed=1), named(name="other")}) == 3
    config = asdict(Config(model=None, data=None))
    assert len({identity(config, "a", "c"), identity(config, "b", "c"), identity(config, "a", "d")}) == 3
