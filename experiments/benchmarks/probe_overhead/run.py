"""Run the benchmark of recording: time in turns in one process, peak memory in separate processes."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks.harness import (
    measure_peak_memory,
    results_stem,
    run_in_child_process,
    run_in_turns,
    time_run,
    write_results,
)
from experiments.benchmarks.probe_overhead import modes
from experiments.benchmarks.probe_overhead.report import draw_overhead, overhead_markdown
from experiments.config.benchmark_schema import BenchConfig, BenchModel
from experiments.config.schema import Config
from experiments.devices import select_device
from experiments.provenance import provenance

log = logging.getLogger(__name__)
WARM_UP = 32  # visual tokens of the first pass, which does not count


def run_overhead_benchmark(config: Config, resolved: dict[str, Any]) -> list[Path]:
    """Measure the modes, models and sizes of `config.bench`.

    Args:
        config: The configuration of the job.
        resolved: The same configuration as plain values, which the file name is a hash of.

    Returns:
        The paths of the record `bench/<identity>.json`, its table (.md) and its figure.

    Raises:
        ValueError: If a mode is unknown, or the plain pass is missing.
        PermissionError: If the results folder cannot be written.
    """
    bench, device = config.bench, select_device(config.device)
    assert bench is not None
    unknown = [mode for mode in bench.modes if mode not in modes.MODES]
    if unknown:
        raise ValueError(f"bench.modes: no '{unknown[0]}'; use {', '.join(modes.MODES)}")
    if "plain" not in bench.modes:
        raise ValueError("bench.modes: 'plain' is missing; add it, because the other modes are compared with it")
    stem = results_stem(config, resolved, "bench")
    if bench.threads:
        torch.set_num_threads(bench.threads)

    rows = [
        row for model in bench.models for visual in bench.visual for row in _measure_modes(bench, model, visual, device)
    ]
    record = {"bench": asdict(bench), "rows": rows, "provenance": provenance(device)}
    return [*write_results(record, overhead_markdown(record), stem), *draw_overhead(record, stem)]


def _measure_modes(bench: BenchConfig, model: BenchModel, visual: int, device: torch.device) -> list[dict[str, Any]]:
    """Return a row for each mode at one size. Modes that exceed the memory limit do not run."""
    fitting = [
        mode for mode in bench.modes if modes.attention_matrices_gib(mode, model, bench, visual) <= bench.limit_gib
    ]
    rounds, masses = _time_modes(bench, model, visual, device, fitting)
    rows = []
    for mode in bench.modes:
        row: dict[str, Any] = {"model": model.name, "layers": model.layers, "visual": visual, "text": bench.text}
        row |= {"mode": mode, "seconds": None, "memory": None, "error": None}
        row["matrices_gib"] = round(modes.attention_matrices_gib(mode, model, bench, visual), 3)
        if mode in fitting:
            row["seconds"] = [round(seconds, 4) for seconds in rounds[mode]]
            row["memory"] = _measure_mode_memory(bench, model, visual, device, mode)
            if "text" in fitting and mode in masses:
                row["error"] = float((masses[mode] - masses["text"]).abs().max())
        rows.append(row)
        log.info("%s", json.dumps({name: row[name] for name in ("model", "visual", "mode", "seconds", "memory")}))
    return rows


@torch.no_grad()
def _time_modes(
    bench: BenchConfig, model: BenchModel, visual: int, device: torch.device, names: list[str]
) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """Return the seconds of each mode in each round of turns, and the masses that it recorded."""
    llama = modes.build_llama(model, bench.vocabulary, bench.dtype, device)
    runs: dict[str, modes.Run] = {}
    for name in names:
        modes.prepare_mode(name, llama, *modes.prompt_tokens(llama, WARM_UP, bench.text))()
        runs[name] = modes.prepare_mode(name, llama, *modes.prompt_tokens(llama, visual, bench.text))
    turns = run_in_turns({name: partial(time_run, run, device) for name, run in runs.items()}, bench.repeats)
    masses = {name: results[-1][1].cpu() for name, results in turns.items() if results[-1][1] is not None}
    return {name: [seconds for seconds, _ in results] for name, results in turns.items()}, masses


def _measure_mode_memory(bench: BenchConfig, model: BenchModel, visual: int, device: torch.device, mode: str) -> int:
    """Return the peak bytes of weights, activations and a mode's own data, measured in a separate process."""
    request = {"bench": asdict(bench), "model": asdict(model), "visual": visual, "mode": mode, "device": str(device)}
    return run_in_child_process("experiments.benchmarks.probe_overhead.run", request)


@torch.no_grad()
def _measure_memory_in_this_process(request: dict[str, Any]) -> int:
    model, mode, device = BenchModel(**request["model"]), request["mode"], torch.device(request["device"])
    bench = BenchConfig(**request["bench"] | {"models": [model]})
    if bench.threads:
        torch.set_num_threads(bench.threads)

    def prepare(model: BenchModel, vocabulary: int, visual: int, text: int) -> modes.Run:
        llama = modes.build_llama(model, vocabulary, bench.dtype, device)
        return modes.prepare_mode(mode, llama, *modes.prompt_tokens(llama, visual, text))

    # A small run first imports everything that the mode needs, so imports do not count.
    prepare(BenchModel("small", heads=2, head_width=8, mlp=8, layers=1, of_layers=1), 8, 8, 8)()
    peaks = measure_peak_memory(partial(prepare, model, bench.vocabulary, request["visual"], bench.text), device)
    return peaks["allocated" if device.type == "cuda" else "resident"]


if __name__ == "__main__":
    print(json.dumps(_measure_memory_in_this_process(json.load(sys.stdin))))
