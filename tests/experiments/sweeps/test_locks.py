"""Locks between real processes, which import no torch."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from experiments.sweeps import locks
from experiments.sweeps.locks import Lock, Owner, owner

ROOT = Path(__file__).resolve().parents[3]
HOLD = """
import sys, time
from pathlib import Path
from experiments.sweeps.locks import Lock
with Lock(Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""
# each takes the lock as often as it can; while it has it, no other may: a folder that cannot be made twice tells
COMPETE = """
import os, sys, time
from pathlib import Path
from experiments.sweeps.locks import Lock
folder, until, got = Path(sys.argv[1]), float(sys.argv[2]), 0
while time.time() < until:
    with Lock(folder / "locks" / "a") as mine:
        if mine:
            os.mkdir(folder / "inside")
            got += 1
            os.rmdir(folder / "inside")
            if sys.argv[3] == "die" and got % 5 == 0:
                os.kill(os.getpid(), 9)
print(got)
"""


@contextmanager
def holding(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a lock, or says that it does not."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def changed(folder: Path, **fields: object) -> Path:
    """Another owner is written into a lock, of a process that does not run here unless `fields` say so."""
    folder.mkdir(parents=True)
    path = folder / "other.json"
    path.write_text(json.dumps(Owner("elsewhere/1", 1, 1.0, 1.0).__dict__ | fields))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "locks" / "ab"


def test_held_once_and_free_again(folder):
    with Lock(folder) as mine:
        assert mine
        assert owner(folder).pid == os.getpid()
        with Lock(folder) as again:
            assert not again
        assert owner(folder) is not None  # who did not get it takes nothing away
    assert owner(folder) is None
    assert not list(folder.parent.iterdir())
    with Lock(folder) as mine:
        assert mine


def test_an_error_frees_it(folder):
    with pytest.raises(KeyError), Lock(folder):
        raise KeyError
    assert not list(folder.parent.iterdir())


def test_another_process_has_it_until_it_is_killed(folder):
    with holding(folder) as process:
        assert said(process) == "True"
        assert owner(folder).pid == process.pid
        with Lock(folder) as mine:
            assert not mine
        os.kill(process.pid, signal.SIGKILL)
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert owner(folder) is None  # dead, though its parent has not yet looked
        with Lock(folder) as mine:
            assert mine
            assert owner(folder).pid == os.getpid()
        assert not list(folder.parent.iterdir())


def test_a_number_given_to_another_process_is_not_the_owner(folder):
    this = Owner.this_process()
    changed(folder, host=this.host, pid=this.pid, started=this.started - 100)
    assert owner(folder) is None
    with Lock(folder) as mine:
        assert mine


def test_elsewhere_signs_of_life_decide(folder):
    path = changed(folder)
    assert owner(folder).host == "elsewhere/1"
    with Lock(folder) as mine:
        assert not mine
    past = time.time() - locks.DEAD_AFTER - 1
    os.utime(path, (past, past))
    assert owner(folder) is None
    with Lock(folder) as mine:
        assert mine
    assert not path.exists()


def test_a_folder_left_without_an_owner_is_free(folder):
    folder.mkdir(parents=True)
    with Lock(folder) as mine:
        assert mine


def test_an_owner_that_cannot_be_read_lives_as_long_as_it_gives_signs(folder):
    path = changed(folder)
    path.write_text('{"host": ')
    with Lock(folder) as mine:
        assert not mine
    os.utime(path, (0, 0))
    with Lock(folder) as mine:
        assert mine


def test_signs_of_life_are_given(folder, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT", 0.01)
    with Lock(folder):
        (sign,) = folder.iterdir()
        os.utime(sign, (0, 0))
        until = time.monotonic() + 10
        while sign.stat().st_mtime == 0:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert sign.stat().st_mtime == pytest.approx(time.time(), abs=5)


LOSE = """
import signal, sys, time
from pathlib import Path
from experiments.sweeps import locks

signal.signal(signal.SIGINT, getattr(signal, sys.argv[2]))
locks.HEARTBEAT = 0.01
folder = Path(sys.argv[1])
with locks.Lock(folder):
    (sign,) = folder.iterdir()
    sign.unlink()
    time.sleep(60)
print("went on")
"""


@pytest.mark.parametrize(
    ("hears", "code"), [("default_int_handler", -signal.SIGINT), ("SIG_IGN", -signal.SIGTERM)], ids=["hears", "deaf"]
)
def test_who_lost_it_is_stopped(folder, hears, code):
    """Also where Ctrl-C is ignored: a shell without job control starts what it puts into the background so."""
    command = [sys.executable, "-c", LOSE, str(folder), hears]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert ended.returncode == code, ended.stderr
    assert "went on" not in ended.stdout
    assert ("KeyboardInterrupt" in ended.stderr) == (hears != "SIG_IGN")


def test_no_folder_no_lock(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError), Lock(tmp_path / "file" / "ab"):
        pass
    with pytest.raises(NotADirectoryError), Lock(tmp_path / "file"):
        pass


@pytest.mark.parametrize("end", ["live", "die"])
def test_of_many_processes_one_at_a_time_has_it(tmp_path, end):
    """Also where they die with the lock in hand, so that others take it from the dead."""
    until = str(time.time() + 4)
    command = [sys.executable, "-c", COMPETE, str(tmp_path), until, end]
    running = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "1234"
    ]
    ended = [(*process.communicate(), process.returncode) for process in running]
    for out, err, code in ended:
        assert not err, err
        assert code == 0 or (end == "die" and code == -signal.SIGKILL)
        assert code or int(out) >= 0
    if end == "live":
        assert sum(int(out) for out, _, _ in ended) > 10
    else:
        assert any(code for _, _, code in ended)
    with Lock(tmp_path / "locks" / "a") as mine:
        assert mine
