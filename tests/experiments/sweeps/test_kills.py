"""A sweep that is killed again and again, and whose records are harmed, ends with the table of one left in peace."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TABLE = ["experiment=table6_prefusion", "row=0,1,5", "seed=0,1"]
CELLS = [
    *TABLE,
    "train.steps=12",
    "train.save_every=2",
    "train.batch_size=4",
    "data.train=60",
    "data.test=20",
    "device=cpu",
]
KILLS = 24
HARMS = ("truncated", "garbled", "changed")  # what is done to a record after every fifth kill, if there is one
LONGEST = 3.0  # seconds between a process's sign of work and its end
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def start(results: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "experiments.run", "-m", *CELLS, f"results={results}"]
    log = (results.parent / f"{results.name}.err").open("a")
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log, text=True, start_new_session=True
    )


def tables(results: Path) -> dict[str, bytes]:
    """The report's tables, and the figures' pictures, but for the one table of times and places."""
    command = [sys.executable, "-m", "experiments.report", "--results", str(results)]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    files = [path for path in (results / "report").rglob("*") if path.suffix in (".md", ".csv", ".tex", ".png")]
    return {str(p.relative_to(results / "report")): p.read_bytes() for p in files if p.stem != "provenance"}


def contents(results: Path) -> dict[str, dict]:
    records = {path.name: json.loads(path.read_text()) for path in (results / "records").glob("*.json")}
    for record in records.values():
        del record["provenance"], record["digest"], record["config"]["results"]
    return records


def phase(results: Path) -> str:
    """What the killed process was at."""
    done = len(list((results / "records").glob("*.json")))
    held = [path.name for path in (results / "locks").glob("[!.]*") if any(path.iterdir())]
    if not held:
        return f"between cells, {done} recorded"
    steps = [
        int(found[1])
        for path in results.glob(f"work/{held[0]}/checkpoint-*")
        if (found := re.search(r"-(\d+)$", path.name))
    ]
    if not steps:
        return f"building or in the first steps, {done} recorded"
    whole = (results / "work" / held[0] / f"checkpoint-{max(steps)}" / "trainer_state.json").is_file()
    where = "testing or writing" if max(steps) == 12 and whole else "training"
    return f"{where}, checkpoint of step {max(steps)}{'' if whole else ' half written'}, {done} recorded"


def harm(results: Path, how: str, chance: random.Random) -> str:
    path = chance.choice(sorted((results / "records").glob("*.json")))
    text = path.read_bytes()
    at = chance.randrange(1, len(text))
    if how == "truncated":
        path.write_bytes(text[:at])
    elif how == "garbled":
        path.write_bytes(text[:at] + chance.randbytes(50) + text[at + 50 :])
    else:
        path.write_bytes(
            re.sub(rb'"image":"[01]+"', lambda found: found[0].translate(bytes.maketrans(b"01", b"10")), text)
        )
    return f"{path.name} {how}"


def killed(results: Path, chance: random.Random) -> str | None:
    """Start the sweep and kill it within `LONGEST` seconds of its start, of taking up a cell or (mostly) of a checkpoint.
    None if it ends first."""
    process = start(results)
    wait, begun = chance.uniform(0, LONGEST), time.monotonic()
    sign = chance.choice([None, "locks/*/*", "work/*/*", "work/*/*", "work/*/*"])
    if sign:
        before = set(results.glob(sign))
        while process.poll() is None and set(results.glob(sign)) <= before:
            time.sleep(0.02)
    try:
        process.wait(wait)
        assert process.returncode == 0
        return None
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"after {time.monotonic() - begun:5.1f} s, {phase(results)}"


@pytest.mark.slow
def test_killed_again_and_again_a_sweep_ends_with_the_same_table(tmp_path):
    chance = random.Random(0)
    log, ended, round_, harms = [], [], 1, list(HARMS)
    while len(log) < KILLS:
        results = tmp_path / f"killed{round_}"
        told = killed(results, chance)
        if told is None:
            ended.append(results)
            round_ += 1
            continue
        log.append(f"kill {len(log) + 1:2}, sweep {round_}: {told}")
        if len(log) % 5 == 0 and harms and list((results / "records").glob("*.json")):
            log[-1] += f"; then {harm(results, harms.pop(0), chance)}"
    assert not harms
    assert sum("checkpoint" in line for line in log) > KILLS / 3  # they hit what they should
    if results not in ended:
        assert start(results).wait() == 0
        ended.append(results)
    assert start(tmp_path / "peace").wait() == 0
    expected, records = tables(tmp_path / "peace"), contents(tmp_path / "peace")
    assert len(records) == 6
    for results in ended:
        assert contents(results) == records
        found = tables(results)
        assert found == expected
        assert not [*results.glob("locks/[!.]*"), *results.glob("work/*")]
        log.append(
            f"{results.name}: {len(found)} files of the report and {len(records)} records as in peace, byte for byte"
        )
    (tmp_path / "kills.log").write_text("\n".join(log) + "\n")
