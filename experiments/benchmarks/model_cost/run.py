"""Measure LLaVA and LLaVA-Mini in turns on this machine: `python -m experiments.run experiment=cost`."""

from __future__ import annotations

import json
import logging
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import logging as transformers_logging

from experiments.benchmarks.harness import (
    measure_peak_memory,
    results_stem,
    run_in_child_process,
    run_in_turns,
    time_run,
    write_results,
)
from experiments.benchmarks.model_cost.figures import component_bars, memory_curves
from experiments.benchmarks.model_cost.models import (
    MemoryNeeds,
    build_models,
    estimate_models,
    model_configs,
    prompt_inputs,
)
from experiments.benchmarks.model_cost.record_markdown import cost_record_markdown
from experiments.benchmarks.model_cost.records import group_by_setting
from experiments.config.benchmark_schema import CostConfig
from experiments.config.schema import Config
from experiments.cost.architectures import llava_config
from experiments.cost.estimate import CostEstimate
from experiments.devices import select_device
from experiments.evaluation.flops import kv_cache_bytes
from experiments.provenance import provenance
from experiments.report.figures.style import save
from probes.hooks.decoder import cache_name

log = logging.getLogger(__name__)
_cpu_info = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class AnswerCost:
    """The measured cost of one answer.

    Args:
        seconds: Seconds of each of `records.COMPONENTS` until the first token ("prefill" are the language model's
            layers); of "first token", from the images to it; and of "decode", for each further token.
        cache_bytes: Bytes of the keys and values of the prompt.
    """

    seconds: dict[str, float]
    cache_bytes: int


def run_cost_benchmark(config: Config, resolved: dict[str, Any]) -> list[Path]:
    """Measure the models and sizes of `config.cost`.

    Args:
        config: The configuration of the job.
        resolved: The same configuration as plain values, which the file name is a hash of.

    Returns:
        The paths of the record `cost/<identity>.json`, its tables (.md) and its figures.

    Raises:
        ValueError: If the architecture is unknown, or no model fits into memory.
        PermissionError: If the results folder cannot be written.
    """
    cost, device = config.cost, select_device(config.device)
    assert cost is not None
    transformers_logging.set_verbosity_error()
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    estimates = estimate_models(cost, device)
    stem = results_stem(config, resolved, "cost")
    if cost.threads:
        torch.set_num_threads(cost.threads)
    # The models are released when this returns. Memory is measured in processes that need it.
    rows = _measure_rows(cost, estimates, device)
    for row in rows:
        if row["seconds"] is not None:
            request = {"cost": asdict(cost), "model": row["model"], "frames": row["frames"], "device": str(device)}
            row["memory"] = run_in_child_process("experiments.benchmarks.model_cost.run", request)
        log.info("%s", json.dumps({key: row[key] for key in ("model", "frames", "memory", "cache_bytes")}))
    record = {
        "cost": asdict(cost),
        "pixels": llava_config(cost.geometry, setting="cost.geometry").vision_config.image_size * cost.tiles,
        "machine": device_name(device),
        "rows": rows,
        "provenance": {"started": started, **provenance(device)},
    }
    measured_models = group_by_setting([record])
    written = [*write_results(record, cost_record_markdown(record), stem), *save(component_bars(measured_models), stem)]
    if len(cost.frames) > 1:
        written += save(memory_curves(measured_models), stem.with_name(f"{stem.name}-memory"))
    return written


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = re.findall(r"^model name\s*: (.+)$", _cpu_info.read_text(), re.M) if _cpu_info.exists() else []
    threads = torch.get_num_threads()
    return f"{names[0] if names else platform.processor() or device.type}, {threads} thread{'s' * (threads > 1)}"


@torch.no_grad()
def measure_answer(model: Any, inputs: dict[str, Any], length: int, device: torch.device) -> AnswerCost:
    """Process a prompt, generate tokens greedily, and return the cost.

    Args:
        model: A LLaVA or LLaVA-Mini.
        inputs: The prompt, as `prompt_inputs` returns it.
        length: Tokens to generate.
        device: The model's device.
    """
    inputs = dict(inputs)
    if isinstance(inputs["pixel_values"], torch.Tensor):
        inputs["pixel_values"] = inputs["pixel_values"].to(device)
    with _timed_components(model, device) as component_seconds:
        first_token, outputs = time_run(lambda: model(**inputs, use_cache=True, logits_to_keep=1), device)
    name = cache_name(outputs)
    cache = outputs[name]
    cache_bytes = kv_cache_bytes(cache)  # before decoding extends the cache

    def decode_rest() -> None:
        token = outputs.logits.argmax(-1)
        for _ in range(length - 1):
            token = model(input_ids=token, use_cache=True, **{name: cache}).logits.argmax(-1)

    decode, _ = time_run(decode_rest, device)
    seconds = component_seconds() | {"first token": first_token, "decode": decode / (length - 1)}
    return AnswerCost(seconds, cache_bytes)


def _measure_rows(
    cost: CostConfig, estimates: dict[tuple[str, int], tuple[CostEstimate, MemoryNeeds, bool]], device: torch.device
) -> list[dict[str, Any]]:
    """Return a row for each model and number of frames. The models take turns."""
    models = build_models(model_configs(cost), cost.dtype, device)
    rows = []
    for frames in cost.frames:
        frame_estimates = {name: estimates[name, frames] for name in models}
        inputs = {
            name: prompt_inputs(models[name], frames, cost.text, cost.tiles)
            for name, (*_, fits) in frame_estimates.items()
            if fits
        }
        runs = {
            name: partial(measure_answer, models[name], prompt, cost.answer, device) for name, prompt in inputs.items()
        }
        run_in_turns(runs, 1)  # does not count
        answers = run_in_turns(runs, cost.repeats)
        for name, (estimate, needs, _) in frame_estimates.items():
            rows.append(_estimated_entries(name, estimate, needs, cost) | _measured_entries(answers.get(name)))
    return rows


def _estimated_entries(name: str, estimate: CostEstimate, needs: MemoryNeeds, cost: CostConfig) -> dict[str, Any]:
    """Return the entries of a row that need no measurement.

    FLOPs are those that the benchmark runs, with the head on one token.
    """
    flops = {part: count.flops("full") for part, count in estimate.components.items()}
    flops["head"] = estimate.cost_model.head.flops("full")
    return {
        "model": name,
        "size": getattr(estimate.cost_model.config, "compressor_size", 0),
        "frames": estimate.prompt.frames,
        "visual_tokens": estimate.visual_tokens,
        "prefusion_layers": estimate.cost_model.prefusion_layers,
        "flops": flops | {"decode": estimate.decode.flops("full")},
        "flops_paper": estimate.flops("paper"),
        "cache_estimate": estimate.cache_bytes(getattr(torch, cost.dtype).itemsize),
        "needs": {"total": needs.total, **asdict(needs)},
        "memory": None,
    }


def _measured_entries(answers: list[AnswerCost] | None) -> dict[str, Any]:
    """Return the measured entries of a row, None each if the model did not run."""
    if answers is None:
        return {"seconds": None, "cache_bytes": None}
    seconds = {name: [answer.seconds[name] for answer in answers] for name in answers[0].seconds}
    return {"seconds": seconds, "cache_bytes": statistics.mode(answer.cache_bytes for answer in answers)}


@contextmanager
def _timed_components(model: Any, device: torch.device) -> Iterator[Callable[[], dict[str, float]]]:
    """Time each component while the block runs; yield a function that returns their seconds after the block."""
    inner = model.model
    components: dict[str, nn.Module | None] = {
        "tower": inner.vision_tower,
        "projector": inner.multi_modal_projector,
        "compressor": getattr(inner, "compressor", None),
        "prefusion": getattr(inner, "prefusion", None),
        "prefill": inner.language_model,
        "head": model.lm_head,
    }
    moments: dict[str, list[Any]] = {name: [] for name in components}
    handles = []

    def mark(name: str) -> None:
        moments[name].append(_moment(device))

    for name, module in components.items():
        if module is not None:
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: mark(name)))
            handles.append(module.register_forward_hook(lambda *_, name=name: mark(name)))
    try:
        yield lambda: {
            name: float(sum(_seconds_between(*pair) for pair in zip(times[::2], times[1::2], strict=True)))
            for name, times in moments.items()
        }
    finally:
        for handle in handles:
            handle.remove()


def _moment(device: torch.device) -> Any:
    """Return the current moment of the device's work. On a GPU it is an event, because the CPU runs ahead of the GPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds_between(start: Any, end: Any) -> float:
    return start.elapsed_time(end) / 1000 if isinstance(start, torch.cuda.Event) else end - start


def _measure_memory_in_this_process(request: dict[str, Any]) -> dict[str, int]:
    """Return the peak bytes of one answer by one model, including its weights."""
    transformers_logging.set_verbosity_error()
    cost, device = CostConfig(**request["cost"]), torch.device(request["device"])
    if cost.threads:
        torch.set_num_threads(cost.threads)

    def prepare(name: str, cost: CostConfig, frames: int) -> Callable[[], object]:
        configs = {key: config for key, config in model_configs(cost).items() if key in ("LLaVA", name)}
        model = build_models(configs, cost.dtype, device)[name]
        inputs = prompt_inputs(model, frames, cost.text, cost.tiles)
        return partial(measure_answer, model, inputs, cost.answer, device)

    # A small run first loads and sets up the libraries, so that does not count.
    prepare("LLaVA-Mini, 1 token", CostConfig("tiny", [1], [1], dtype=cost.dtype, text=2, answer=2), 1)()
    return measure_peak_memory(partial(prepare, request["model"], cost, request["frames"]), device)


if __name__ == "__main__":
    print(json.dumps(_measure_memory_in_this_process(json.load(sys.stdin))))
