"""Time of each mode in one process, in turns; peak memory of each in a process of its own."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks.harness import in_child, in_turns, peak_memory, results_stem, timed, write_results
from experiments.benchmarks.probe_overhead import modes
from experiments.benchmarks.probe_overhead.report import draw, table
from experiments.config.schema import BenchConfig, BenchModel, Config
from experiments.devices import choose_device
from experiments.provenance import provenance

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
    stem = results_stem(config, resolved, "bench")
    if bench.threads:
        torch.set_num_threads(bench.threads)

    rows = [row for model in bench.models for visual in bench.visual for row in _measure(bench, model, visual, device)]
    record = {"bench": asdict(bench), "rows": rows, "provenance": provenance(device)}
    return [*write_results(record, table(record), stem), *draw(record, stem)]


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
    turns = in_turns({name: partial(timed, run, device) for name, run in runs.items()}, bench.repeats)
    masses = {name: found[-1][1].cpu() for name, found in turns.items() if found[-1][1] is not None}
    return {name: [spent for spent, _ in found] for name, found in turns.items()}, masses


def _memory(bench: BenchConfig, model: BenchModel, visual: int, device: torch.device, mode: str) -> int:
    """Most bytes at once of weights, activations and all that the mode adds, in a process that does nothing else."""
    asked = {"bench": asdict(bench), "model": asdict(model), "visual": visual, "mode": mode, "device": str(device)}
    return in_child("experiments.benchmarks.probe_overhead.run", asked)


@torch.no_grad()
def _memory_here(asked: dict[str, Any]) -> int:
    bench, device = BenchConfig(**asked["bench"] | {"models": []}), torch.device(asked["device"])
    model, mode = BenchModel(**asked["model"]), asked["mode"]
    if bench.threads:
        torch.set_num_threads(bench.threads)

    def prepare(model: BenchModel, vocabulary: int, visual: int, text: int) -> modes.Run:
        whole = modes.build(model, vocabulary, bench.dtype, device)
        return modes.prepare(mode, whole, *modes.inputs(whole, visual, text))

    # Whatever a mode imports is there before the count begins.
    prepare(BenchModel("small", heads=2, head_width=8, mlp=8, layers=1, of_layers=1), 8, 8, 8)()
    taken = peak_memory(partial(prepare, model, bench.vocabulary, asked["visual"], bench.text), device)
    return taken["allocated" if device.type == "cuda" else "resident"]


if __name__ == "__main__":
    print(json.dumps(_memory_here(json.load(sys.stdin))))
