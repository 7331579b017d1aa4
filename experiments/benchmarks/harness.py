"""What benchmarks share: time in turns, peak memory in a process of its own, and the files that a result becomes."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from experiments.config.identity import identity
from experiments.config.schema import Config
from experiments.files import write_atomically
from experiments.provenance import code_version

T = TypeVar("T")


def timed(run: Callable[[], T], device: torch.device | None = None) -> tuple[float, T]:
    """Seconds until all work of a run is done, and what it returned."""
    wait: Callable[[], None] = torch.cuda.synchronize if device and device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    found = run()
    wait()
    return time.perf_counter() - started, found


def in_turns(runs: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """What each returned in each round. They take turns, so that what else the machine does falls on all of them."""
    found: dict[str, list[T]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            found[name].append(run())
    return found


def in_child(module: str, asked: dict[str, Any]) -> Any:
    """What `python -m module` prints last, as JSON, when it is given this as JSON; nothing else runs in that process.

    Raises:
        RuntimeError: If it fails; with the last line of what it said.
    """
    child = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        check=False,
    )
    if child.returncode:
        said = child.stderr.strip().splitlines() or [f"it ended with {child.returncode}"]
        raise RuntimeError(f"measuring memory in a process of its own failed: {said[-1]}")
    return json.loads(child.stdout.splitlines()[-1])


def peak_memory(prepare: Callable[[], Callable[[], object]], device: torch.device) -> dict[str, int]:
    """Most bytes at once of what `prepare` makes and of the run that it returns: `resident` in the process, beyond what
    it held before; on CUDA also `allocated` and `reserved` by torch on the device."""
    before = resident()
    run = prepare()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run()
    found = {"resident": peak() - before}
    if device.type == "cuda":
        found |= {
            "allocated": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
        }
    return found


def resident() -> int:
    """Bytes that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    """Of this process since its start, in bytes. Where Linux tells it, without what its parent had taken."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def results_stem(config: Config, resolved: dict[str, Any], kind: str) -> Path:
    """`<results>/<kind>/<identity>`, its folder made.

    Raises:
        PermissionError: The results folder cannot be written.
    """
    folder = Path(config.results) / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PermissionError(f"results folder '{config.results}' cannot be written ({error.strerror})") from error
    return folder / identity(resolved, "", code_version())


def write_results(record: dict[str, Any], table: str, stem: Path) -> list[Path]:
    """The record as JSON and its table as Markdown, whole or not at all."""
    texts = {".json": json.dumps(record, indent=1, allow_nan=False) + "\n", ".md": table}
    for ending, text in texts.items():
        write_atomically(stem.with_suffix(ending), text)
    return [stem.with_suffix(ending) for ending in texts]
