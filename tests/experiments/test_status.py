"""`python -m experiments.status`: the table of a sweep's cells and of a folder's records, and the time left."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import status
from experiments.sweeps.store import RecordStore
from tests.experiments.sweeps.run_sweep import TINY_CELL, tiny_cell, write_minimal_record

ROOT = Path(__file__).resolve().parents[2]


def shown(capsys, *overrides: str) -> str:
    """Return what the command prints."""
    assert status.main(overrides) == 0
    return capsys.readouterr().out


def test_main_for_sweep_shows_each_cell_with_state_time_and_note(tmp_path, capsys):
    table = [*TINY_CELL, "experiment=table6_prefusion", f"results={tmp_path}"]
    cells = [tiny_cell(tmp_path, "experiment=table6_prefusion", f"row={row}", "seed=0") for row in range(4)]
    write_minimal_record(cells[0], "finished", 50)
    write_minimal_record(cells[1], "finished", 70)
    write_minimal_record(cells[2], "failed", 1)
    with RecordStore(tmp_path).lock(cells[3].id):
        text = shown(capsys, *table, "row=0,1,2,3,4", "seed=0")
        lines = {line.split("│")[2].strip(): line for line in text.splitlines() if "│ table6" in line}
        assert list(lines) == ["LLaVA", "1 token", "16 tokens", "64 tokens", "144 tokens"]
        states = ("finished", "finished", "failed", "running", "missing")
        assert all(state in line for state, line in zip(states, lines.values(), strict=True))
        assert "0:00:50" in lines["LLaVA"]
        assert "ValueError: [no]" in lines["16 tokens"]
        assert f"process {os.getpid()} on" in lines["64 tokens"]
        assert "5 cells: 1 failed, 2 finished, 1 missing, 1 running" in text
        assert "0:01:00 a cell; about 0:0" in text
        everything = shown(capsys, f"results={tmp_path}")
        assert "4 cells: 1 failed, 2 finished, 1 running" in everything
        assert "left" not in everything.splitlines()[-2]


def test_main_takes_the_flags_of_the_sweep(tmp_path, capsys):
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text("# @package _global_\nname: mine\nseed: 3\n")
    words = ["-m", "experiment=mine", "--config-dir", str(tmp_path / "own"), f"results={tmp_path}"]
    assert "1 cell: 1 missing" in shown(capsys, *words)


def test_main_with_truncated_record_shows_file_and_reason(tmp_path, capsys):
    broken = tiny_cell(tmp_path)
    write_minimal_record(broken, "finished", 5)
    path = RecordStore(tmp_path).path(broken.id)
    path.write_text(path.read_text()[:50])
    text = shown(capsys, f"results={tmp_path}")
    assert f"{broken.id}.json" in text
    assert "not valid JSON" in text
    assert "1 cell: 1 unreadable" in text


def test_main_with_record_under_another_name_shows_it_as_unreadable(tmp_path, capsys):
    cell = tiny_cell(tmp_path)
    write_minimal_record(cell, "finished", 5)
    path = RecordStore(tmp_path).path(cell.id)
    path.rename(path.with_name("0123.json"))
    text = shown(capsys, f"results={tmp_path}")
    assert "0123.json" in text
    assert "1 cell: 1 unreadable" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["results=nowhere"], "nowhere/records"),
        (["experiment=nope"], "experiment: no option 'nope'"),
        (["train.steps=4"], "train.steps: renamed; use train.max_steps"),
        (["experiment=table6_prefusion", "row=1", "compressor.size=4"], "compressor.size=4: row 1 ('1 token')"),
    ],
    ids=["no folder", "no experiment", "renamed setting", "override that a row undoes"],
)
def test_main_with_wrong_input_exits_with_one_line(overrides, message, capsys):
    with pytest.raises(SystemExit):
        status.main(overrides)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    ("running", "missing", "left"),
    [
        ([], 3, "0:03:00 left for 1 process"),
        ([30.0, 90.0], 3, "0:01:45 left for 2 processes"),
        ([90.0], 0, "0:00:00 left for 1 process"),
    ],
)
def test_summary_estimates_time_left(running, missing, left):
    """A cell takes 60 s on average. One that has run for 30 s needs 30 s more, one that has run for 90 s needs none."""
    lines = [status.StatusLine("", "", "finished", seconds, "") for seconds in (50.0, 70.0)]
    lines += [status.StatusLine("", "", "running", seconds, "") for seconds in running]
    lines += [status.StatusLine("", "", "missing", None, "")] * missing
    assert status.summary(lines).endswith(left)


def test_status_after_edited_sources_keeps_cell_on_reworded_docstring_and_not_on_changed_computation(tmp_path):
    """Record a cell, then ask for its status from a copy of the sources that is edited."""
    for package in ("experiments", "llava_mini", "probes", "conf"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    write_minimal_record(tiny_cell(tmp_path / "results"), "finished", 5)

    def last_line() -> str:
        command = [sys.executable, "-m", "experiments.status", *TINY_CELL, "seed=0"]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip().splitlines()[-1]

    assert last_line() == "1 cell: 1 finished"
    source = tmp_path / "experiments" / "evaluation" / "accuracy.py"
    docstring, rest = source.read_text().split("\n", 1)
    assert docstring.endswith('"""')
    source.write_text(f'"""A reworded docstring."""\n# and a comment\n{rest}')
    assert last_line() == "1 cell: 1 finished"
    source.write_text(f"{source.read_text()}\nPERCENT = 100\n")
    assert last_line() == "1 cell: 1 missing"


@pytest.mark.parametrize(
    "quote", ["'{}'", '"{}"', "{}", "${{oc.env:RECORDS}}"], ids=["single", "double", "none", "variable"]
)
def test_main_with_a_quoted_or_resolved_results_folder_lists_its_records(tmp_path, monkeypatch, capsys, quote):
    folder = tmp_path / "my results"
    (folder / "records").mkdir(parents=True)
    (folder / "records" / "broken.json").write_text("{")
    monkeypatch.setenv("RECORDS", str(folder))
    assert status.main([f"results={quote.format(folder)}"]) == 0
    assert "broken.json" in capsys.readouterr().out
