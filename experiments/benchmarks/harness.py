"""Shared parts of the benchmarks: timing in turns, peak memory of a separate process, and result files."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import psutil  # type: ignore[import-untyped]
import torch

from experiments.config.identity import cell_identity
from experiments.config.schema import Config
from experiments.files import write_atomically
from experiments.provenance import code_version

T = TypeVar("T")


def time_run(run: Callable[[], T], device: torch.device | None = None) -> tuple[float, T]:
    """Return the seconds until all work of a run is done, and its result.

    Args:
        run: The function to time.
        device: A CUDA device is synchronised before and after the run.
    """
    synchronize: Callable[[], None] = torch.cuda.synchronize if device and device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    result = run()
    synchronize()
    return time.perf_counter() - start, result


def cpu_seconds(run: Callable[[], object]) -> float:
    """Return the CPU seconds of this process that a run takes, all threads."""
    start = time.process_time()
    run()
    return time.process_time() - start


def run_in_turns(runs: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Call each function once in every round, and return its results.

    The functions take turns, so other load on the machine affects all of them alike.

    Args:
        runs: Functions by name.
        repeats: Number of rounds.
    """
    results: dict[str, list[T]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            results[name].append(run())
    return results


def run_in_child_process(module: str, request: dict[str, Any]) -> Any:
    """Run `python -m module` in a process of its own, and return its last output line, read as JSON.

    Args:
        module: The module to run.
        request: Input of the module, passed as JSON on stdin.

    Raises:
        RuntimeError: If the process fails. The message holds the last line of its stderr.
    """
    child = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        check=False,
    )
    if child.returncode:
        error_lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
        raise RuntimeError(f"the process of {module} failed: {error_lines[-1]}")
    return json.loads(child.stdout.splitlines()[-1])


def measure_peak_memory(prepare: Callable[[], Callable[[], object]], device: torch.device) -> dict[str, int]:
    """Measure the peak memory of preparing and executing a run.

    Args:
        prepare: Builds what the run needs, and returns the run.
        device: The device of the run.

    Returns:
        Bytes: `resident`, the peak of the process beyond its size before `prepare`. On CUDA also the peaks `allocated`
        and `reserved` of torch on the device.
    """
    before = current_resident_bytes()
    run = prepare()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run()
    peaks = {"resident": peak_resident_bytes() - before}
    if device.type == "cuda":
        peaks |= {
            "allocated": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
        }
    return peaks


def current_resident_bytes() -> int:
    """Return the resident memory of this process in bytes."""
    return psutil.Process().memory_info().rss


def peak_resident_bytes() -> int:
    """Return the peak resident memory of this process since its start, in bytes.

    psutil has no such figure on Linux. VmHWM comes first because `ru_maxrss` also counts the memory that the parent
    process had when it started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def results_stem(config: Config, resolved: dict[str, Any], kind: str) -> Path:
    """Return the path `<results>/<kind>/<identity>` without suffix, and create its folder.

    Args:
        config: The configuration, for its results folder.
        resolved: The settings that the identity is a hash of.
        kind: The kind of benchmark.

    Raises:
        PermissionError: If the results folder cannot be written.
    """
    folder = Path(config.results) / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PermissionError(f"results folder '{config.results}' cannot be written ({error.strerror})") from error
    return folder / cell_identity(resolved, "", code_version())


def write_results(record: dict[str, Any], table: str, stem: Path) -> list[Path]:
    """Write a record as JSON and its table as Markdown, each atomically, and return both paths."""
    texts = {".json": json.dumps(record, indent=1, allow_nan=False) + "\n", ".md": table}
    for ending, text in texts.items():
        write_atomically(stem.with_suffix(ending), text)
    return [stem.with_suffix(ending) for ending in texts]
