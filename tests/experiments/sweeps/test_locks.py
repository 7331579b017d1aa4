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
from experiments.sweeps.locks import CellLock, LockOwner, lock_owner

ROOT = Path(__file__).resolve().parents[3]
HOLD = """
import sys, time
from pathlib import Path
from experiments.sweeps.locks import CellLock
with CellLock(Path(sys.argv[1])) as held:
    print(held, flush=True)
    time.sleep(60)
"""
# Take the lock as often as possible. A folder cannot be made twice, so mkdir fails if two processes hold the lock.
COMPETE = """
import os, sys, time
from pathlib import Path
from experiments.sweeps.locks import CellLock
folder, end, times_held = Path(sys.argv[1]), float(sys.argv[2]), 0
while time.time() < end:
    with CellLock(folder / "locks" / "a") as held:
        if held:
            os.mkdir(folder / "inside")
            times_held += 1
            os.rmdir(folder / "inside")
            if sys.argv[3] == "die" and times_held % 5 == 0:
                os.kill(os.getpid(), 9)
print(times_held)
"""


@contextmanager
def process_with_lock(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that takes a lock and prints whether it got it; kill the process at the end of the block."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def first_line(process: subprocess.Popen[str]) -> str:
    """Return the first line that a process prints, once it has printed it."""
    assert process.stdout
    return process.stdout.readline().strip()


def write_owner(folder: Path, **fields: object) -> Path:
    """Write another owner into a lock: a process on another machine, unless `fields` name this one."""
    folder.mkdir(parents=True)
    path = folder / "other.json"
    path.write_text(json.dumps(LockOwner("elsewhere/1", 1, 1.0, 1.0).__dict__ | fields))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a lock that nobody holds."""
    return tmp_path / "locks" / "ab"


def test_cell_lock_is_held_once_and_free_after_its_block(folder):
    with CellLock(folder) as held:
        assert held
        assert lock_owner(folder).pid == os.getpid()
        with CellLock(folder) as held_again:
            assert not held_again
        assert lock_owner(folder) is not None  # an attempt that fails leaves the lock to its owner
    assert lock_owner(folder) is None
    assert not list(folder.parent.iterdir())
    with CellLock(folder) as held:
        assert held


def test_cell_lock_is_free_after_an_error_in_its_block(folder):
    with pytest.raises(KeyError), CellLock(folder):
        raise KeyError
    assert not list(folder.parent.iterdir())


def test_cell_lock_of_another_process_is_free_once_that_is_killed(folder):
    with process_with_lock(folder) as process:
        assert first_line(process) == "True"
        assert lock_owner(folder).pid == process.pid
        with CellLock(folder) as held:
            assert not held
        os.kill(process.pid, signal.SIGKILL)
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert lock_owner(folder) is None  # dead, though its parent has not yet collected it
        with CellLock(folder) as held:
            assert held
            assert lock_owner(folder).pid == os.getpid()
        assert not list(folder.parent.iterdir())


def test_cell_lock_of_reused_process_id_is_free(folder):
    this = LockOwner.this_process()
    write_owner(folder, host=this.host, pid=this.pid, started=this.started - 100)
    assert lock_owner(folder) is None
    with CellLock(folder) as held:
        assert held


def test_cell_lock_of_another_machine_is_free_once_its_heartbeat_is_old(folder):
    path = write_owner(folder)
    assert lock_owner(folder).host == "elsewhere/1"
    with CellLock(folder) as held:
        assert not held
    old = time.time() - locks.DEAD_AFTER - 1
    os.utime(path, (old, old))
    assert lock_owner(folder) is None
    with CellLock(folder) as held:
        assert held
    assert not path.exists()


def test_cell_lock_folder_without_an_owner_is_free(folder):
    folder.mkdir(parents=True)
    with CellLock(folder) as held:
        assert held


def test_cell_lock_with_unreadable_owner_is_free_once_its_heartbeat_is_old(folder):
    path = write_owner(folder)
    path.write_text('{"host": ')
    with CellLock(folder) as held:
        assert not held
    os.utime(path, (0, 0))
    with CellLock(folder) as held:
        assert held


def test_cell_lock_while_held_renews_its_heartbeat(folder, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT", 0.01)
    with CellLock(folder):
        (file,) = folder.iterdir()
        os.utime(file, (0, 0))
        deadline = time.monotonic() + 10
        while file.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert file.stat().st_mtime == pytest.approx(time.time(), abs=5)


LOSE = """
import signal, sys, time
from pathlib import Path
from experiments.sweeps import locks

signal.signal(signal.SIGINT, getattr(signal, sys.argv[2]))
locks.HEARTBEAT = 0.01
folder = Path(sys.argv[1])
with locks.CellLock(folder):
    (file,) = folder.iterdir()
    file.unlink()
    time.sleep(60)
print("continued")
"""


@pytest.mark.parametrize(
    ("handler", "code"),
    [("default_int_handler", -signal.SIGINT), ("SIG_IGN", -signal.SIGTERM)],
    ids=["handles Ctrl-C", "ignores Ctrl-C"],
)
def test_cell_lock_taken_by_another_process_stops_its_former_owner(folder, handler, code):
    """A shell without job control starts background processes that ignore Ctrl-C. They are terminated."""
    command = [sys.executable, "-c", LOSE, str(folder), handler]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert ended.returncode == code, ended.stderr
    assert "continued" not in ended.stdout
    assert ("KeyboardInterrupt" in ended.stderr) == (handler != "SIG_IGN")


def test_cell_lock_in_a_folder_that_cannot_be_made_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError), CellLock(tmp_path / "file" / "ab"):
        pass
    with pytest.raises(NotADirectoryError), CellLock(tmp_path / "file"):
        pass


@pytest.mark.parametrize("behaviour", ["live", "die"])
def test_cell_lock_wanted_by_many_processes_is_held_by_one_at_a_time(tmp_path, behaviour):
    """Processes that die while they hold the lock must leave it to the others."""
    end = str(time.time() + 4)
    command = [sys.executable, "-c", COMPETE, str(tmp_path), end, behaviour]
    running = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "1234"
    ]
    ended = [(*process.communicate(), process.returncode) for process in running]
    for output, error, code in ended:
        assert not error, error
        assert code == 0 or (behaviour == "die" and code == -signal.SIGKILL)
        assert code or int(output) >= 0
    if behaviour == "live":
        assert sum(int(output) for output, _, _ in ended) > 10
    else:
        assert any(code for _, _, code in ended)
    with CellLock(tmp_path / "locks" / "a") as held:
        assert held
