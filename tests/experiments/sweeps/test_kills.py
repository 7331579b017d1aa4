"""A sweep in workers that is killed many times, and whose records are damaged, ends as an uninterrupted serial one."""

import contextlib
import glob
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[3]
STEPS = 12
SIX_CELLS = [
    "experiment=table6_prefusion",
    "row=0,1,5",
    "seed=0,1",
    f"train.max_steps={STEPS}",
    "train.save_steps=2",
    "train.batch_size=4",
    "data.train_samples=60",
    "data.test_samples=20",
    "device=cpu",
]
DAMAGES = ("truncated", "garbled", "changed")  # one each is done to a record after the first kills that leave records
VICTIMS = ("all processes", "the parent", "a worker")
# What a kill waits for (nothing, a lock, or a file that a cell writes while it trains), and the most seconds from then
# to the kill. Training takes about a second, imports several.
EVENTS = ((None, 3.0), ("locks/*/*", 2.0), ("work/*/*", 1.0), ("work/*/*", 1.0))
PARALLEL, SERIAL = "hydra.launcher.workers=2", "hydra/launcher=basic"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def start_sweep(results: Path, *overrides: str) -> subprocess.Popen[str]:
    """Start the sweep in a process group of its own. Its output goes to a file beside the results folder."""
    command = [sys.executable, "-m", "experiments.run", "-m", *SIX_CELLS, *overrides, f"results={results}"]
    log = (results.parent / f"{results.name}.err").open("a")
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log, text=True, start_new_session=True
    )


def report_files(results: Path) -> dict[str, bytes]:
    """Return the report's tables and figures, without the table of provenance, which holds times."""
    command = [sys.executable, "-m", "experiments.report", "--results", str(results)]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    files = [path for path in (results / "report").rglob("*") if path.suffix in (".md", ".csv", ".tex", ".png")]
    return {str(p.relative_to(results / "report")): p.read_bytes() for p in files if p.stem != "provenance"}


def records_without_times(results: Path) -> dict[str, dict]:
    """Return the records by file name, without the parts that depend on when and where they were made."""
    records = {path.name: json.loads(path.read_text()) for path in (results / "records").glob("*.json")}
    for record in records.values():
        del record["provenance"], record["digest"], record["config"]["results"]
    return records


def files_of(results: Path, pattern: str) -> set[str]:
    """Return the paths that match a pattern, without hidden ones.

    `glob.glob` passes over a folder that a running sweep removes meanwhile; `Path.glob` of Python 3.10 to 3.12 raises.
    """
    return set(glob.glob(f"{glob.escape(str(results))}/{pattern}"))


def phase_at_kill(results: Path) -> str:
    """Return in words what the sweep is doing: one of its cells, if several run."""
    recorded = len(files_of(results, "records/*.json"))
    locked = sorted({Path(owner).parent.name for owner in files_of(results, "locks/*/*")})
    if not locked:
        return f"between cells, {recorded} recorded"
    checkpoints = files_of(results, f"work/{locked[0]}/checkpoint-*")
    steps = [int(match[1]) for path in checkpoints if (match := re.search(r"-(\d+)$", path))]
    if not steps:
        return f"building or in the first steps, {recorded} recorded"
    complete = (results / "work" / locked[0] / f"checkpoint-{max(steps)}" / "trainer_state.json").is_file()
    activity = "testing or writing" if max(steps) == STEPS and complete else "training"
    return f"{activity}, checkpoint of step {max(steps)}{'' if complete else ' half written'}, {recorded} recorded"


def damage_a_record(results: Path, damage: str, rng: random.Random) -> str:
    """Damage a random record in place.

    Args:
        results: The results folder.
        damage: One of DAMAGES.
        rng: Chooses the record and where it is damaged.

    Returns:
        The record's file name and the damage.
    """
    path = rng.choice(sorted((results / "records").glob("*.json")))
    content = path.read_bytes()
    position = rng.randrange(1, len(content))
    if damage == "truncated":
        path.write_bytes(content[:position])
    elif damage == "garbled":
        path.write_bytes(content[:position] + rng.randbytes(50) + content[position + 50 :])
    else:
        swap = bytes.maketrans(b"01", b"10")
        path.write_bytes(re.sub(rb'"image":"[01]+"', lambda match: match[0].translate(swap), content))
    return f"{path.name} {damage}"


def kill(process: subprocess.Popen[str], victim: str, rng: random.Random) -> str:
    """Kill one of VICTIMS of a sweep, and wait until the sweep has ended.

    A sweep without one of its workers goes on, and ends with the status of a sweep that lacks cells.

    Returns:
        Who was killed: all processes, if there is no worker yet.
    """
    workers = []
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            workers += [child] if any("spawn_main" in word for word in child.cmdline()) else []
    if victim == "a worker" and workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            rng.choice(workers).kill()
        assert process.wait() in (0, 1)  # 0 if the worker had no cell any more
        return victim
    if victim == "the parent" and workers:
        process.kill()
        process.wait()
        assert not psutil.wait_procs(workers, timeout=60)[1]
        return victim
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return "all processes"


def start_and_kill(
    results: Path, victim: str, pattern: str | None, longest_delay: float, rng: random.Random
) -> str | None:
    """Start the sweep in two workers, and kill some of its processes after an event.

    Args:
        results: The results folder.
        victim: One of VICTIMS.
        pattern: The files of which a new one is the event; None for the start.
        longest_delay: The most seconds between the event and the kill.
        rng: Chooses the seconds.

    Returns:
        Who was killed, when, and what it was doing; None if the sweep finished first.
    """
    process = start_sweep(results, PARALLEL)
    delay, started = rng.uniform(0, longest_delay), time.monotonic()
    if pattern:
        before = files_of(results, pattern)
        while process.poll() is None and files_of(results, pattern) <= before:
            time.sleep(0.02)
    try:
        process.wait(delay)
        assert process.returncode == 0
        return None
    except subprocess.TimeoutExpired:
        seconds, phase = time.monotonic() - started, phase_at_kill(results)
        return f"{kill(process, victim, rng)} after {seconds:5.1f} s, {phase}"


@pytest.mark.slow
def test_sweep_that_is_killed_many_times_ends_with_the_records_and_report_of_an_uninterrupted_one(tmp_path):
    rng = random.Random(0)
    log, finished, number, damages = [], [], 1, list(DAMAGES)
    kills = list(itertools.product(VICTIMS, EVENTS))
    planned = len(kills)
    rng.shuffle(kills)
    while kills:
        victim, event = kills[-1]
        results = tmp_path / f"killed{number}"
        outcome = start_and_kill(results, victim, *event, rng)
        if outcome is None:
            finished.append(results)
            number += 1
            continue
        kills.pop()
        log.append(f"kill {len(log) + 1:2}, sweep {number}: {outcome}")
        if damages and list((results / "records").glob("*.json")):
            log[-1] += f"; then {damage_a_record(results, damages.pop(0), rng)}"
    assert not damages
    assert sum("checkpoint" in line for line in log) >= planned / 3  # enough kills hit a cell that trains
    if results not in finished:
        assert start_sweep(results, PARALLEL).wait() == 0
        finished.append(results)
    uninterrupted = tmp_path / "uninterrupted"
    assert start_sweep(uninterrupted, SERIAL).wait() == 0
    expected_report, expected_records = report_files(uninterrupted), records_without_times(uninterrupted)
    assert len(expected_records) == 6
    for results in finished:
        assert records_without_times(results) == expected_records
        report = report_files(results)
        assert report == expected_report
        assert not [*results.glob("locks/[!.]*"), *results.glob("work/*")]
        log.append(
            f"{results.name}: {len(report)} report files and {len(expected_records)} records equal those of the "
            "uninterrupted sweep, byte for byte"
        )
    (tmp_path / "kills.log").write_text("\n".join(log) + "\n")
