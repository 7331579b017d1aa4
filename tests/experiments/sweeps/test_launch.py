"""Sweeps over cells of two questions each: which are skipped, run and recorded, and what the log reports."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.sweeps.runner import run_if_needed
from experiments.sweeps.store import RecordStore, ResultsFolderError
from tests.experiments.sweeps.run_sweep import (
    ROOT,
    TINY_CELL,
    tiny_cell,
    write_minimal_record,
)
from tests.experiments.sweeps.test_locks import first_line, process_with_lock


@pytest.fixture
def cell(tmp_path):
    """A function that returns the cell of some overrides, with the test's results folder."""
    return lambda *overrides: tiny_cell(tmp_path, *overrides)


def modification_times(folder: Path) -> dict[str, int]:
    """Return the modification time of each record, by file name."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "records").iterdir()}


def test_run_sweep_with_cell_that_raises_records_failure_and_runs_the_others(sweep, tmp_path):
    code, lines = sweep("compressor.name=nope,none")
    assert code == 1
    assert lines[-1] == "2 cells: 1 failed, 1 finished"
    assert lines[-2].startswith("compressor.name=nope: failed: ValueError: compressor")
    paths = RecordStore(tmp_path).records.iterdir()
    records = {record["status"]: record for record in (json.loads(path.read_text()) for path in paths)}
    assert records["failed"]["error"].startswith("ValueError: compressor")
    assert "'nope'" in records["failed"]["error"]
    assert "\n" not in records["failed"]["error"]
    assert records["failed"]["traceback"].startswith("Traceback")
    assert f"{ROOT}/experiments/" not in records["failed"]["traceback"]
    assert '"experiments/run_cell.py"' in records["failed"]["traceback"]
    assert records["failed"]["config"]["compressor"]["name"] == "nope"
    assert len(records["finished"]["accuracy"]["image"]) == 2
    assert not list((tmp_path / "locks").iterdir())

    before = modification_times(tmp_path)
    code, lines = sweep("compressor.name=nope,none")
    assert code == 1
    assert lines[-1] == "2 cells: 1 failed, 1 finished (1 finished before)"
    assert modification_times(tmp_path) == before

    code, lines = sweep("compressor.name=nope,none", "retry_failed=true")
    assert code == 1
    assert sum(modification_times(tmp_path)[name] != before[name] for name in before) == 1
    assert RecordStore(tmp_path).status(records["finished"]["id"]).state == "finished"


def test_run_sweep_runs_failed_cell_only_with_retry_failed(sweep, cell, tmp_path):
    failed = cell()
    write_minimal_record(failed, "failed", 1)
    code, lines = sweep("seed=0")
    assert (code, lines[-1]) == (1, "1 cell: 1 failed")
    assert "failed before, not run again (--retry-failed" in lines[-2]
    assert run_if_needed(failed, record_input_errors=False).state == "failed"
    code, lines = sweep("seed=0", "retry_failed=true")
    assert (code, lines[-1]) == (0, "1 cell: 1 finished")
    assert RecordStore(tmp_path).status(failed.id).state == "finished"


def test_run_sweep_with_job_folders_as_current_folders_keeps_relative_results(sweep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = ["hydra.job.chdir=true", "hydra.sweep.dir=jobs", "hydra.sweep.subdir=${hydra.job.num}"]
    code, lines = sweep("seed=0,1", *folders, results="there")
    assert (code, lines[-1]) == (0, "2 cells: 2 finished")
    assert len(list((tmp_path / "there" / "records").iterdir())) == 2
    assert Path.cwd() == tmp_path


def test_run_sweep_leaves_cell_to_the_process_that_runs_it(sweep, cell, tmp_path):
    locked = cell("seed=1")
    with process_with_lock(tmp_path / "locks" / locked.id) as process:
        assert first_line(process) == "True"
        code, lines = sweep("seed=1,0")
        assert code == 0
        assert lines[-1] == "2 cells: 1 finished, 1 running"
        assert f"seed=1: run by process {process.pid} on " in lines[-2]
        assert run_if_needed(locked, record_input_errors=False).owner.pid == process.pid
        assert modification_times(tmp_path).keys() == {f"{cell('seed=0').id}.json"}
    code, lines = sweep("seed=1,0")  # the process was killed
    assert (code, lines[-1]) == (0, "2 cells: 2 finished (1 finished before)")


@pytest.mark.parametrize(
    "damage",
    [lambda text: text[:100], lambda text: "", lambda text: text.replace('"image":"', '"image":"1')],
    ids=["truncated", "empty", "changed"],
)
def test_run_sweep_with_damaged_record_makes_it_again(sweep, cell, damage):
    sweep("seed=0")
    path = RecordStore(cell().config.results).path(cell().id)
    original = json.loads(path.read_text())
    path.write_text(damage(path.read_text()))
    assert sweep("seed=0")[0] == 0
    repeated = json.loads(path.read_text())
    assert {key for key in original if repeated[key] != original[key]} <= {"provenance", "digest"}


@pytest.mark.parametrize("state", ["finished", "failed"])
def test_run_if_needed_skips_cell_that_ended_just_before_its_lock_was_taken(cell, monkeypatch, state):
    ended = cell()
    lock = RecordStore.lock

    def lock_late(store: RecordStore, identity: str) -> object:
        write_minimal_record(ended, state, 5)
        return lock(store, identity)

    monkeypatch.setattr(RecordStore, "lock", lock_late)
    monkeypatch.setattr("experiments.run_cell.run_cell", lambda *_: pytest.fail("the cell ran again"))
    assert run_if_needed(ended, record_input_errors=False).state == state


def test_run_if_needed_raises_wrong_input_or_records_it(cell, tmp_path):
    wrong = cell("compressor.name=nope")
    with pytest.raises(ValueError, match=r"compressor.*'nope'"):
        run_if_needed(wrong, record_input_errors=False)
    assert RecordStore(tmp_path).status(wrong.id).state == "missing"
    status = run_if_needed(wrong, record_input_errors=True)
    assert status.state == RecordStore(tmp_path).status(wrong.id).state == "failed"


def test_run_if_needed_records_bug_with_traceback(cell, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.run_cell.run_cell", lambda *_: [][1])
    status = run_if_needed(cell(), record_input_errors=False)
    assert status.state == "failed"
    assert status.record["error"] == "IndexError: list index out of range"
    assert "Traceback" in RecordStore(tmp_path).record(cell().id)["traceback"]


def test_run_sweep_removes_checkpoints_that_a_kill_left_of_finished_cell(sweep, cell):
    sweep("seed=0")
    work = RecordStore(cell().config.results).work(cell().id)
    work.mkdir(parents=True)
    sweep("seed=0")
    assert not work.exists()


def test_run_sweep_with_one_wrong_job_raises_before_any_cell_runs(sweep, tmp_path):
    with pytest.raises(ValueError, match="row: no row 9"):
        sweep("experiment=table6_prefusion", "row=0,9")
    assert not list(tmp_path.rglob("*.json"))


def test_run_sweep_with_unwritable_results_folder_raises_before_any_cell_runs(sweep, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsFolderError, match=r"file/results'.*results=FOLDER"):
        sweep("seed=0,1", results=tmp_path / "file" / "results")
    assert "#0" not in capsys.readouterr().err


def test_run_sweep_with_disk_that_fills_ends_at_that_cell(sweep, tmp_path, capsys, monkeypatch):
    def fill_disk(cell, work, *_):
        work.mkdir(parents=True)
        raise RuntimeError("a checkpoint could not be written") from OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("experiments.run_cell.run_cell", fill_disk)
    with pytest.raises(SystemExit):
        sweep("seed=0,1")
    error = capsys.readouterr().err
    last = error.splitlines()[-1]
    assert last.startswith(f"error: results folder '{tmp_path}'")
    assert "No space left" in last
    assert "run the same command again" in last
    assert "#1" not in error
    assert not modification_times(tmp_path)


def test_run_sweep_of_another_table_reuses_finished_cell(sweep):
    sweep("seed=0")
    code, lines = sweep("seed=0", "name=another")
    assert (code, lines[-1]) == (0, "1 cell: 1 finished (1 finished before)")


def test_run_sweep_of_finished_cells_imports_no_torch(tmp_path):
    for seed in (0, 1):
        write_minimal_record(tiny_cell(tmp_path, f"seed={seed}"), "finished", 5)
    code = "import sys; sys.modules['torch'] = None; from experiments.run import main; main()"
    command = [sys.executable, "-c", code, "-m", *TINY_CELL, "seed=0,1", f"results={tmp_path}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == "2 cells: 2 finished (2 finished before)\n"
