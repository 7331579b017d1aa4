"""Sweeps on real cells of two questions each: what is skipped, what is run, what is recorded and what is said."""

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import open_dict

from experiments import status
from experiments.cell import Cell
from experiments.config import registry as configuration
from experiments.run import _flag_as_override
from experiments.sweeps import hydra_api, plan
from experiments.sweeps.launch import sweep
from experiments.sweeps.runner import attempt
from experiments.sweeps.store import ResultsError, Store
from experiments.task import job
from tests.experiments.sweeps.run_sweep import FOUND
from tests.experiments.sweeps.test_locks import holding, said

ROOT = Path(__file__).resolve().parents[3]
SMALL = ("model=tiny", "data.train=8", "data.test=2", "device=cpu")


@pytest.fixture
def swept(tmp_path, capsys):
    """Run a sweep over the test's results folder; its exit status and its last lines."""
    configuration.register()
    root, ours = logging.getLogger(), logging.getLogger("experiments")
    before = root.handlers[:], root.level, ours.level

    def run(*overrides: str, results: Path = tmp_path) -> tuple[int, list[str]]:
        code = sweep([*SMALL, *overrides, f"results={results}"], job)
        return code, capsys.readouterr().err.strip().splitlines()

    yield run
    root.handlers[:], root.level, ours.level = before


@pytest.fixture
def cell(tmp_path):
    """The cell that overrides name."""

    def named(*overrides: str) -> Cell:
        configuration.register()
        with hydra_api.hydra() as hydra:
            (job,) = plan.expand(hydra, [*SMALL, *overrides, f"results={tmp_path}"])[1]
        assert job.cell
        return job.cell

    return named


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "records").iterdir()}


def test_a_cell_that_raises_is_recorded_and_stops_nothing(swept, tmp_path):
    code, told = swept("compressor.name=nope,none")
    assert code == 1
    assert told[-1] == "2 cells: 1 failed, 1 finished"
    assert told[-2].startswith("compressor.name=nope: failed: ValueError: compressor must be")
    records = {
        record["status"]: record
        for record in map(json.loads, (p.read_text() for p in Store(tmp_path).records.iterdir()))
    }
    assert records["failed"]["error"].startswith("ValueError: compressor must be 'none' or one of")
    assert "\n" not in records["failed"]["error"]
    assert records["failed"]["traceback"].startswith("Traceback")
    assert str(ROOT) + "/experiments/attempt.py" not in records["failed"]["traceback"]
    assert records["failed"]["config"]["compressor"]["name"] == "nope"
    assert len(records["finished"]["accuracy"]["image"]) == 2
    assert not list((tmp_path / "locks").iterdir())

    written = times(tmp_path)
    code, told = swept("compressor.name=nope,none")
    assert code == 1
    assert told[-1] == "2 cells: 1 failed, 1 finished (1 finished before)"
    assert times(tmp_path) == written

    code, told = swept("compressor.name=nope,none", "retry_failed=true")
    assert code == 1
    assert sum(times(tmp_path)[name] != written[name] for name in written) == 1
    assert Store(tmp_path).standing(records["finished"]["id"]).state == "finished"


def test_what_failed_is_run_again_only_when_asked_to(swept, cell, tmp_path):
    failed = cell()
    store = Store(tmp_path)
    store.prepare()
    store.write(
        {"schema": 1, "id": failed.id, "experiment": "single", "name": "a", "status": "failed", "error": "once"}
        | {"config": failed.resolved, "provenance": {}}
    )
    code, told = swept("seed=0")
    assert (code, told[-1]) == (1, "1 cell: 1 failed")
    assert attempt(failed, record_all=False).state == "failed"
    code, told = swept("seed=0", "retry_failed=true")
    assert (code, told[-1]) == (0, "1 cell: 1 finished")
    assert store.standing(failed.id).state == "finished"


def test_what_another_process_runs_is_left_to_it(swept, cell, tmp_path):
    held = cell("seed=1")
    with holding(tmp_path / "locks" / held.id) as process:
        assert said(process) == "True"
        code, told = swept("seed=1,0")
        assert code == 0
        assert told[-1] == "2 cells: 1 finished, 1 running"
        assert f"seed=1: run by process {process.pid} on " in told[-2]
        assert attempt(held, record_all=False).owner.pid == process.pid
        assert times(tmp_path).keys() == {f"{cell('seed=0').id}.json"}
    code, told = swept("seed=1,0")  # it was killed
    assert (code, told[-1]) == (0, "2 cells: 2 finished (1 finished before)")


@pytest.mark.parametrize(
    "harm", [lambda text: text[:100], lambda text: "", lambda text: text.replace('"image":"', '"image":"1')]
)
def test_a_record_that_is_harmed_is_made_again(swept, cell, harm):
    swept("seed=0")
    path = Store(cell().config.results).path(cell().id)
    whole = json.loads(path.read_text())
    path.write_text(harm(path.read_text()))
    assert swept("seed=0")[0] == 0
    made = json.loads(path.read_text())
    differ = {key for key in whole if made[key] != whole[key]}
    assert differ <= {"provenance", "digest"}


@pytest.mark.parametrize("state", ["finished", "failed"])
def test_what_another_ended_just_before_the_lock_was_had_is_not_run_again(cell, tmp_path, monkeypatch, state):
    ended = cell()
    lock = Store.lock

    def late(store: Store, identity: str) -> object:
        planted(ended, state, 5)
        return lock(store, identity)

    monkeypatch.setattr(Store, "lock", late)
    monkeypatch.setattr("experiments.run_cell.run_cell", lambda *_: pytest.fail("run again"))
    assert attempt(ended, record_all=False).state == state


def test_what_a_kill_left_of_a_finished_cell_is_removed(swept, cell):
    swept("seed=0")
    work = Store(cell().config.results).work(cell().id)
    work.mkdir(parents=True)
    swept("seed=0")
    assert not work.exists()


def test_wrong_input_ends_a_sweep_before_anything_runs(swept, tmp_path):
    with pytest.raises(ValueError, match="no row 9"):
        swept("experiment=table6_prefusion", "row=0,9")
    assert not list(tmp_path.rglob("*.json"))


def test_a_results_folder_that_cannot_be_written_ends_a_sweep_before_its_first_cell(swept, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match=r"file/results' cannot be written .*; choose another with results=FOLDER"):
        swept("seed=0,1", results=tmp_path / "file" / "results")
    assert "#0" not in capsys.readouterr().err


def test_a_disk_that_fills_ends_a_sweep_at_that_cell(swept, tmp_path, capsys, monkeypatch):
    def full(cell, work):
        work.mkdir(parents=True)
        raise RuntimeError("a checkpoint could not be written") from OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("experiments.run_cell.run_cell", full)
    with pytest.raises(SystemExit):
        swept("seed=0,1")
    told = capsys.readouterr().err
    assert told.splitlines()[-1].startswith(f"error: results folder '{tmp_path}' cannot be written (No space left")
    assert "make room there, then run the same command again" in told
    assert "#1" not in told
    assert not times(tmp_path)


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=table6_prefusion", "row=0,3,8", "seed=0,1", "train.steps=2"],
        ["compressor=query,query_4", "compressor.name=average", "probe=full,none", "model.grid=null,6"],
        ["experiment=ablation", "+data.rounds={place:2,count:3}", "model.dtype=float32"],
        ["data.rounds={place:2},{count:3}"],
    ],
)
def test_jobs_are_what_hydra_makes_of_them(overrides):
    configuration.register()
    with hydra_api.hydra() as hydra:
        sweep_, jobs = plan.expand(hydra, overrides)
        assert len({job.cell.id for job in jobs}) == len(jobs) > 1
        for job in jobs:
            config = hydra.config_loader.load_sweep_config(sweep_, job.overrides)
            with open_dict(config):
                del config["hydra"]
            found = plan.identify(config)
            assert (found.id, found.resolved, found.row) == (job.cell.id, job.cell.resolved, job.cell.row)


def test_tables_share_a_cell(swept, cell):
    swept("seed=0")
    code, told = swept("seed=0", "name=another")
    assert (code, told[-1]) == (0, "1 cell: 1 finished (1 finished before)")


def test_cells_that_are_done_wait_for_no_torch(swept, tmp_path):
    swept("seed=0,1")
    code = "import sys; sys.modules['torch'] = None; from experiments.run import main; main()"
    command = [sys.executable, "-c", code, "-m", *SMALL, "seed=0,1", f"results={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "2 cells: 2 finished (2 finished before)\n"


@pytest.mark.parametrize(
    ("given", "understood"),
    [
        ("-m a=1 --retry-failed b=2", "-m retry_failed=true a=1 b=2"),
        ("--retry-failed --cfg job a=1", "--cfg job retry_failed=true a=1"),
        ("a=1 --cfg job --retry-failed", "retry_failed=true a=1 --cfg job"),
        ("--retry-failed", "retry_failed=true"),
        ("-m a=1", "-m a=1"),
    ],
)
def test_the_flag_that_runs_failed_cells_again(given, understood):
    assert _flag_as_override(given.split()) == understood.split()


def test_help_names_the_flag():
    command = [sys.executable, "-m", "experiments.run", "--retry-failed", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--retry-failed runs again what failed before" in done.stdout
    assert "retry_failed: true" in done.stdout


def shown(capsys, *overrides: str) -> str:
    assert status.main(overrides) == 0
    return capsys.readouterr().out


def planted(cell: Cell, state: str, seconds: float) -> None:
    store = Store(cell.config.results)
    store.prepare()
    record = FOUND | {
        "schema": 1,
        "id": cell.id,
        "experiment": cell.config.name,
        "name": cell.label,
        "status": state,
        "error": None if state == "finished" else "ValueError: [no]",
        "config": cell.resolved,
        "provenance": {"started": "2026-01-01T00:00:00+00:00", "seconds": seconds},
    }
    store.write(record)


def test_status_of_a_sweep(cell, tmp_path, capsys):
    table = [*SMALL, "experiment=table6_prefusion", f"results={tmp_path}"]
    found = [cell("experiment=table6_prefusion", f"row={row}", "seed=0") for row in range(4)]
    planted(found[0], "finished", 50)
    planted(found[1], "finished", 70)
    planted(found[2], "failed", 1)
    with Store(tmp_path).lock(found[3].id):
        text = shown(capsys, *table, "row=0,1,2,3,4", "seed=0")
        rows = {line.split("│")[2].strip(): line for line in text.splitlines() if "│ table6" in line}
        assert list(rows) == ["LLaVA", "1 token", "16 tokens", "64 tokens", "144 tokens"]
        states = ("finished", "finished", "failed", "running", "missing")
        assert all(state in line for state, line in zip(states, rows.values(), strict=True))
        assert "0:00:50" in rows["LLaVA"]
        assert "ValueError: [no]" in rows["16 tokens"]
        assert f"process {os.getpid()} on" in rows["64 tokens"]
        assert "5 cells: 1 failed, 2 finished, 1 missing, 1 running" in text
        assert "0:01:00 a cell; about 0:0" in text
        everything = shown(capsys, f"results={tmp_path}")
        assert "4 cells: 1 failed, 2 finished, 1 running" in everything
        assert "left" not in everything.splitlines()[-2]


def test_status_of_a_record_that_cannot_be_read(cell, tmp_path, capsys):
    broken = cell()
    planted(broken, "finished", 5)
    path = Store(tmp_path).path(broken.id)
    path.write_text(path.read_text()[:50])
    text = shown(capsys, f"results={tmp_path}")
    assert f"{broken.id}.json" in text
    assert "not valid JSON" in text
    assert "1 cell: 1 unreadable" in text


@pytest.mark.parametrize(
    ("overrides", "said"), [(["results=nowhere"], "no records in 'nowhere/records'"), (["experiment=nope"], "nope")]
)
def test_status_of_what_is_not_there(overrides, said, capsys):
    with pytest.raises(SystemExit):
        status.main(overrides)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.parametrize(
    ("running", "missing", "left"),
    [
        ([], 3, "0:03:00 left for 1 process"),
        ([30.0, 90.0], 3, "0:01:45 left for 2 processes"),
        ([90.0], 0, "0:00:00 left for 1 process"),
    ],
)
def test_time_left(running, missing, left):
    """By hand: a cell takes 60 s; who has run for 30 s needs 30 more, who has run for 90 s none."""
    lines = [status.Line("", "", "finished", seconds, "") for seconds in (50.0, 70.0)]
    lines += [status.Line("", "", "running", seconds, "") for seconds in running]
    lines += [status.Line("", "", "missing", None, "")] * missing
    assert status.summary(lines).endswith(left)
