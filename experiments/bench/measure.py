"""Time of each mode in one process, in turns; peak memory of each in a process of its own."""

from __future__ import annotations

import json
import logging
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from experiments.bench import modes
from experiments.bench.report import draw, table
from experiments.config import BenchConfig, BenchModel, Config, identity
from experiments.models import choose_device
from experiments.store import code_version, provenance, write_atomically

log = logging.getLogger(__name__)
WARM_UP = 32  # visual tokens of the first, uncounted pass


def run_bench(config: Config, resolved: dict[str, Any]) -> list[Path]:
    """Measure all that `config.bench` asks for; write `bench/<identity>.json`, its table (.md) and figure.

    Raises:
        ValueError: An unknown mode, or no plain pass to compare with.
        PermissionError: The results folder cannot be written.
    """
    bench, device = config.bench, choose_device(config.device)
    assert bench is not None
    unknown = [mode for mode in bench.modes if mode not in modes.MODES]
    if unknown:
        raise ValueError(f"bench.modes: no '{unknown[0]}'; there are {', '.join(modes.MODES)}")
    if "plain" not in bench.modes:
        raise ValueError("bench.modes: 'plain' is missing, which the others are compared with")
    folder = Path(config.results) / "bench"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PermissionError(f"results folder '{config.results}' cannot be written ({error.strerror})") from error
    if bench.threads:
        torch.set_num_threads(bench.threads)

    rows = [row for model in bench.models for visual in bench.visual for row in _measure(bench, model, visual, device)]
    record = {"bench": asdict(bench), "rows": rows, "provenance": provenance(device)}
    stem = folder / identity(resolved, "", code_version())
    path = stem.with_suffix(".json")
    write_atomically(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
    write_atomically(stem.with_suffix(".md"), table(record))
    return [path, stem.with_suffix(".md"), *draw(record, stem)]


def _measure(bench: BenchConfig, model: BenchModel, visual: int, device: torch.device) -> list[dict[str, Any]]:
    """One row for each mode at one size."""
    fits = [mode for mode in bench.modes if modes.matrices(mode, model, bench, visual) <= bench.limit_gib]
    rounds, masses = _times(bench, model, visual, device, fits)
    rows = []
    for mode in bench.modes:
        row: dict[str, Any] = {"model": model.name, "layers": model.layers, "visual": visual, "text": bench.text}
        row |= {"mode": mode, "seconds": None, "memory": None, "error": None}
        row["matrices_gib"] = round(modes.matrices(mode, model, bench, visual), 3)
        if mode in fits:
            row["seconds"] = [round(seconds, 4) for seconds in rounds[mode]]
            row["memory"] = _memory(bench, model, visual, device, mode)
            if "text" in fits and mode in masses:
                row["error"] = float((masses[mode] - masses["text"]).abs().max())
        rows.append(row)
        log.info("%s", json.dumps({name: row[name] for name in ("model", "visual", "mode", "seconds", "memory")}))
    return rows


@torch.no_grad()
def _times(
    bench: BenchConfig, model: BenchModel, visual: int, device: torch.device, names: list[str]
) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """Seconds of each mode in each round, and the masses that it found; the modes take turns, so that what else the
    machine does falls on all of them."""
    whole = modes.build(model, bench.vocabulary, bench.dtype, device)
    runs: dict[str, modes.Run] = {}
    for name in names:
        modes.prepare(name, whole, *modes.inputs(whole, WARM_UP, bench.text))()
        runs[name] = modes.prepare(name, whole, *modes.inputs(whole, visual, bench.text))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    masses: dict[str, torch.Tensor] = {}
    for _ in range(bench.repeats):
        for name, run in runs.items():
            spent, found = _timed(run, device)
            seconds[name].append(spent)
            if found is not None:
                masses[name] = found.cpu()
    return seconds, masses


def _timed(run: modes.Run, device: torch.device) -> tuple[float, torch.Tensor | None]:
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    found = run()
    wait()
    return time.perf_counter() - started, found


def _memory(bench: BenchConfig, model: BenchModel, visual: int, device: torch.device, mode: str) -> int:
    """Most bytes at once of weights, activations and all that the mode adds, in a process that does nothing else."""
    asked = json.dumps({"bench": asdict(bench), "model": asdict(model), "visual": visual, "mode": mode})
    child = subprocess.run(
        [sys.executable, "-m", "experiments.bench.measure", str(device)],
        input=asked,
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        check=False,
    )
    if child.returncode:
        raise RuntimeError(f"bench: measuring the memory of '{mode}' failed: {child.stderr.strip().splitlines()[-1]}")
    return int(child.stdout.split()[-1])


@torch.no_grad()
def _memory_here(asked: dict[str, Any], device: torch.device) -> int:
    bench = BenchConfig(**asked["bench"] | {"models": []})
    model, mode = BenchModel(**asked["model"]), asked["mode"]
    if bench.threads:
        torch.set_num_threads(bench.threads)
    # Whatever a mode imports is there before the count begins.
    small = BenchModel("small", heads=2, head_width=8, mlp=8, layers=1, of_layers=1)
    tiny = modes.build(small, 8, bench.dtype, device)
    modes.prepare(mode, tiny, *modes.inputs(tiny, 8, 8))()
    before = 0 if device.type == "cuda" else _resident()
    whole = modes.build(model, bench.vocabulary, bench.dtype, device)
    run = modes.prepare(mode, whole, *modes.inputs(whole, asked["visual"], bench.text))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def _resident() -> int:
    """Bytes in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    print(_memory_here(json.load(sys.stdin), torch.device(sys.argv[1])))
