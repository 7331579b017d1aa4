"""Test the run on a GPU where there is none: its steps, what ends one, what a second call runs, and its page."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from experiments.benchmarks.gpu import __main__ as gpu_main
from experiments.benchmarks.gpu.__main__ import main, run_gpu_steps
from experiments.benchmarks.gpu.long_video import long_video_markdown, measure_long_videos
from experiments.benchmarks.gpu.page import gpu_page
from experiments.benchmarks.gpu.steps import Step, gpu_steps, run_step
from experiments.config.benchmark_schema import CostConfig
from experiments.provenance import ROOT

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def find_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def script(tmp_path: Path, name: str, code: str, limit: int = 60) -> Step:
    """Return a step that runs this code from a module of the temporary folder."""
    (tmp_path / f"{name}.py").write_text(code)
    return Step(name, name.capitalize(), (name,), limit)


def test_gpu_steps_take_less_than_ten_minutes() -> None:
    assert sum(step.limit for step in gpu_steps("cuda", Path("results/gpu"))) < 600


@pytest.mark.parametrize(
    ("code", "status", "last_line"),
    [
        ("print('one'); print('two')", "finished", "two"),
        ("raise ValueError('wrong')", "failed", "ValueError: wrong"),
        ("raise RuntimeError('CUDA out of memory')", "out of memory", "RuntimeError: CUDA out of memory"),
        ("import time; print('begun', flush=True); time.sleep(60)", "timed out", "begun"),
    ],
)
def test_run_step_returns_status_and_end_of_output(tmp_path: Path, code: str, status: str, last_line: str) -> None:
    record = run_step(script(tmp_path, "a_step", code, limit=3 if status == "timed out" else 60), tmp_path)
    assert (record["status"], record["output"][-1]) == (status, last_line)


def test_run_step_time_limit_ends_its_child_processes(tmp_path: Path) -> None:
    note = tmp_path / "note"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {write_for_a_minute(note)!r}])"
    assert run_step(script(tmp_path, "parent", code, limit=3), tmp_path)["status"] == "timed out"
    assert_nothing_writes(note)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_run_step_of_a_killed_run_ends_with_it(tmp_path: Path) -> None:
    note = tmp_path / "note"
    step = script(tmp_path, "a_step", write_for_a_minute(note))
    run = f"from pathlib import Path; from experiments.benchmarks.gpu.steps import *; run_step({step!r}, Path('.'))"
    process = subprocess.Popen([sys.executable, "-c", run], cwd=ROOT)
    while not note.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert_nothing_writes(note)


def write_for_a_minute(note: Path) -> str:
    """Return code that writes to a file ten times a second."""
    return f"import time\nfor number in range(600): open({str(note)!r}, 'a').write('x'); time.sleep(0.1)"


def assert_nothing_writes(note: Path) -> None:
    time.sleep(0.2)  # a killed process may still be ending
    size = note.stat().st_size
    time.sleep(1)
    assert note.stat().st_size == size > 0


def test_run_step_has_no_network_and_lists_its_files(tmp_path: Path) -> None:
    results = tmp_path / "results"
    (results / "part").mkdir(parents=True)
    (results / "old.txt").write_text("written before")
    code = "import os, pathlib; pathlib.Path({!r}).write_text(os.environ['HF_HUB_OFFLINE'])"
    time.sleep(0.02)
    record = run_step(script(tmp_path, "a_step", code.format(str(results / "part" / "new.md"))), results)
    assert record["files"] == ["part/new.md"]
    assert (results / "part" / "new.md").read_text() == "1"


def test_run_gpu_steps_second_call_runs_what_is_not_finished(tmp_path: Path) -> None:
    results, counter = tmp_path / "results", tmp_path / "counter"
    count = f"open({str(counter)!r}, 'a').write('x')"
    good, bad = script(tmp_path, "good_step", count), script(tmp_path, "bad_step", f"{count}; assert False")
    for calls in (1, 2):
        records = run_gpu_steps([good, bad], results, CPU)
        assert [records[name]["status"] for name in ("good_step", "bad_step")] == ["finished", "failed"]
        assert counter.read_text() == "x" * (calls + 1), "the failed step ran again, the finished one did not"
    record = json.loads((results / "steps" / "good_step.json").read_text())
    record["fingerprint"]["torch"] = "1.0"
    (results / "steps" / "good_step.json").write_text(json.dumps(record))
    run_gpu_steps([good], results, CPU)
    assert counter.read_text() == "xxxx", "another torch measures anew"


def test_gpu_page_shows_tables_and_the_output_of_failed_steps(tmp_path: Path) -> None:
    results = tmp_path / "results"
    table = f"import pathlib; pathlib.Path({str(results / 'table.md')!r}).write_text('| a table |')"
    table += f"; pathlib.Path({str(results / 'figure.png')!r}).touch()"
    steps = [script(tmp_path, "good_step", table), script(tmp_path, "bad_step", "raise ValueError('why')")]
    run_gpu_steps(steps, tmp_path / "results", CPU)
    page = (tmp_path / "results" / "README.md").read_text()
    assert "## Good_step\n\n| a table |\n\n![Good_step](figure.png)\n" in page
    assert "| Bad_step | failed |" in page
    assert "**Failed after " in page
    assert "ValueError: why\n```" in page
    assert "The run has not been on a GPU" in page


def test_gpu_page_committed_equals_that_of_no_record() -> None:
    """Until the run has been on a GPU. Afterwards its records make the page."""
    results = ROOT / "results" / "gpu"
    if not (results / "steps").exists():
        page = gpu_page(gpu_steps("cuda", Path("results/gpu")), {}, results)
        assert (results / "README.md").read_text(encoding="utf-8") == page
        assert "It has not run on a GPU" in page


def test_main_without_gpu_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit):
        main(["--results", str(tmp_path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert "cuda" in line
    assert not list(tmp_path.iterdir())


def test_measure_long_videos_cache_grows_by_a_token_a_frame() -> None:
    cost = CostConfig("tiny", [1], [3, 40], text=9, answer=2)
    record = measure_long_videos(cost, CPU)
    short, long = record["rows"]
    # 6 layers of width 128 in float32: keys and values of one token
    assert long["cache"] - short["cache"] == 37 * 2 * 6 * 128 * 4
    assert long["peak"] >= short["peak"] > record["weights"]
    assert min(min(row["seconds"].values()) for row in record["rows"]) > 0


def test_long_video_markdown_shows_time_of_a_frame() -> None:
    seconds = {"first token": 2.5, "prefill": 0.4, "head": 0.1}
    record = {
        "cost": {"geometry": "tiny", "dtype": "bfloat16", "text": 9},
        "side": 32,
        "weights": 3 * 2**20,
        "rows": [{"frames": 1000, "seconds": seconds, "cache": 2**21, "peak": 2**23}],
        "machine": "a GPU",
    }
    row = long_video_markdown(record).splitlines()[2]
    assert row == "| 1,000 | 2.50 | 2.00 | 0.50 | 8 | 2 | 6 |", "6 MiB: 1,000 frames of 3 x 32 x 32 numbers of 2 bytes"


def test_main_interrupted_ends_in_one_line_and_keeps_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"
    steps = [script(tmp_path, "a_step", code)]
    monkeypatch.setattr(gpu_main, "gpu_steps", lambda *_: steps)
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # by workers of pytest-xdist
    try:
        assert main(["--small", "--device", "cpu", "--results", str(tmp_path / "results")]) == 130
    finally:
        signal.signal(signal.SIGINT, ignored)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "interrupted: the same command resumes"
    assert not list((tmp_path / "results" / "steps").iterdir())


@pytest.mark.slow
def test_whole_run_on_the_cpu_finishes_all_steps(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "experiments.benchmarks.gpu",
        "--small",
        "--device",
        "cpu",
        "--results",
        str(tmp_path),
    ]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout
    page = (tmp_path / "README.md").read_text()
    for text in ("passed", "LLaVA-Mini, 1 token", "record_attention, all targets", "| 100 |"):
        assert text in page
