"""LLaVA and LLaVA-Mini side by side on this machine: `python -m experiments.run experiment=cost`."""

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

from experiments.benchmarks.harness import in_child, in_turns, peak_memory, results_stem, timed, write_results
from experiments.benchmarks.model_cost.figures import bars, memory
from experiments.benchmarks.model_cost.markdown import table
from experiments.benchmarks.model_cost.models import Needs, build, configurations, estimates, inputs
from experiments.benchmarks.model_cost.records import measured as by_setting
from experiments.config.schema import Config, CostConfig
from experiments.cost.architectures import geometry
from experiments.cost.estimate import Estimate
from experiments.devices import choose_device
from experiments.evaluation.flops import cache_bytes
from experiments.provenance import provenance
from experiments.report.figures.style import save
from probes.hooks.decoder import cache_name

log = logging.getLogger(__name__)
_processor = Path("/proc/cpuinfo")


def run_cost(config: Config, resolved: dict[str, Any]) -> list[Path]:
    """Measure all that `config.cost` asks for; write `cost/<identity>.json`, its tables (.md) and figure.

    Raises:
        ValueError: An unknown geometry, or one that does not fit in memory.
        PermissionError: The results folder cannot be written.
    """
    cost, device = config.cost, choose_device(config.device)
    assert cost is not None
    transformers_logging.set_verbosity_error()
    begun = datetime.now(timezone.utc).isoformat(timespec="seconds")
    expected = estimates(cost, device)
    stem = results_stem(config, resolved, "cost")
    if cost.threads:
        torch.set_num_threads(cost.threads)
    rows = _rows(cost, expected, device)  # and the models are gone: memory is measured in processes that need it
    for row in rows:
        if row["seconds"] is not None:
            asked_of_child = {"cost": asdict(cost), "model": row["model"], "frames": row["frames"]}
            row["memory"] = in_child("experiments.benchmarks.model_cost.run", asked_of_child | {"device": str(device)})
        log.info("%s", json.dumps({key: row[key] for key in ("model", "frames", "memory", "cache_bytes")}))
    record = {
        "cost": asdict(cost),
        "pixels": geometry(cost.geometry).vision_config.image_size * cost.tiles,
        "machine": machine(device),
        "rows": rows,
        "provenance": {"started": begun, **provenance(device)},
    }
    found = by_setting([record])
    written = [*write_results(record, table(record), stem), *save(bars(found), stem)]
    if len(cost.frames) > 1:
        written += save(memory(found), stem.with_name(f"{stem.name}-memory"))
    return written


def _rows(
    cost: CostConfig, expected: dict[tuple[str, int], tuple[Estimate, Needs, bool]], device: torch.device
) -> list[dict[str, Any]]:
    """Of each model and number of frames what is known beforehand, and what it took in turns with the others."""
    models = build(configurations(cost), cost.dtype, device)
    rows = []
    for frames in cost.frames:
        of_frames = {name: expected[name, frames] for name in models}
        asked = {
            name: inputs(models[name], frames, cost.text, cost.tiles) for name, (*_, fits) in of_frames.items() if fits
        }
        runs = {name: partial(answer, models[name], given, cost.answer, device) for name, given in asked.items()}
        in_turns(runs, 1)  # does not count
        measured = in_turns(runs, cost.repeats)
        for name, (estimate, needs, _) in of_frames.items():
            rows.append(_row(name, estimate, needs, cost) | _found(measured.get(name)))
    return rows


def machine(device: torch.device) -> str:
    """The name of the GPU, or of the processor with the threads that torch uses of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = re.findall(r"^model name\s*: (.+)$", _processor.read_text(), re.M) if _processor.exists() else []
    threads = torch.get_num_threads()
    return f"{names[0] if names else platform.processor() or device.type}, {threads} thread{'s' * (threads > 1)}"


@dataclass(frozen=True)
class Answer:
    """What one answer took.

    Args:
        seconds: Of each of `records.PARTS` until the first token ("prefill" is the language model's layers); "first token", from
            the pictures to it; "decode", each further token.
        cache_bytes: Of keys and values of the prompt.
    """

    seconds: dict[str, float]
    cache_bytes: int


@torch.no_grad()
def answer(model: Any, given: dict[str, Any], length: int, device: torch.device) -> Answer:
    """Take in a prompt and generate `length` tokens, the likeliest each."""
    placed = dict(given)
    if isinstance(placed["pixel_values"], torch.Tensor):
        placed["pixel_values"] = placed["pixel_values"].to(device)
    with _spent(model, device) as spent:
        first, outputs = timed(lambda: model(**placed, use_cache=True, logits_to_keep=1), device)
    name = cache_name(outputs)
    cache = outputs[name]
    held = cache_bytes(cache)

    def rest() -> None:
        token = outputs.logits.argmax(-1)
        for _ in range(length - 1):
            token = model(input_ids=token, use_cache=True, **{name: cache}).logits.argmax(-1)

    decode, _ = timed(rest, device)
    return Answer(spent() | {"first token": first, "decode": decode / (length - 1)}, held)


@contextmanager
def _spent(model: Any, device: torch.device) -> Iterator[Callable[[], dict[str, float]]]:
    """Gives what to ask, once the work is done, for the seconds that each component took."""
    inner = model.model
    parts: dict[str, nn.Module | None] = {
        "tower": inner.vision_tower,
        "projector": inner.multi_modal_projector,
        "compressor": getattr(inner, "compressor", None),
        "prefusion": getattr(inner, "prefusion", None),
        "prefill": inner.language_model,
        "head": model.lm_head,
    }
    marks: dict[str, list[Any]] = {name: [] for name in parts}
    handles = []

    def mark(name: str) -> None:
        marks[name].append(_now(device))

    for name, module in parts.items():
        if module is not None:
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: mark(name)))
            handles.append(module.register_forward_hook(lambda *_, name=name: mark(name)))
    try:
        yield lambda: {
            name: float(sum(_between(*pair) for pair in zip(times[::2], times[1::2], strict=True)))
            for name, times in marks.items()
        }
    finally:
        for handle in handles:
            handle.remove()


def _now(device: torch.device) -> Any:
    """A moment in the device's work, which on a GPU lies ahead of the CPU's."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    return start.elapsed_time(end) / 1000 if isinstance(start, torch.cuda.Event) else end - start


def _row(name: str, estimate: Estimate, needs: Needs, cost: CostConfig) -> dict[str, Any]:
    """What is known before anything is measured; FLOPs are those that are run, with the head on one token."""
    flops = {part: work.flops("full") for part, work in estimate.components.items()}
    flops["head"] = estimate.geometry.head.flops("full")
    return {
        "model": name,
        "size": getattr(estimate.geometry.config, "compressor_size", 0),
        "frames": estimate.prompt.frames,
        "visual_tokens": estimate.visual_tokens,
        "prefusion_layers": estimate.geometry.prefusion_layers,
        "flops": flops | {"decode": estimate.decode.flops("full")},
        "flops_paper": estimate.flops("paper"),
        "cache_estimate": estimate.cache_bytes(getattr(torch, cost.dtype).itemsize),
        "needs": {"total": needs.total, **asdict(needs)},
        "memory": None,
    }


def _found(answers: list[Answer] | None) -> dict[str, Any]:
    if answers is None:
        return {"seconds": None, "cache_bytes": None}
    seconds = {name: [one.seconds[name] for one in answers] for name in answers[0].seconds}
    return {"seconds": seconds, "cache_bytes": statistics.mode(one.cache_bytes for one in answers)}


def _memory_here(asked: dict[str, Any]) -> dict[str, int]:
    """Bytes that one model takes at most for one answer, its weights included."""
    transformers_logging.set_verbosity_error()
    cost, device = CostConfig(**asked["cost"]), torch.device(asked["device"])
    if cost.threads:
        torch.set_num_threads(cost.threads)

    def prepare(name: str, cost: CostConfig, frames: int) -> Callable[[], object]:
        wanted = {key: config for key, config in configurations(cost).items() if key in ("LLaVA", name)}
        model = build(wanted, cost.dtype, device)[name]
        return partial(answer, model, inputs(model, frames, cost.text, cost.tiles), cost.answer, device)

    # Whatever libraries load and set up at first is there before the count begins.
    prepare("LLaVA-Mini, 1 token", CostConfig("tiny", [1], [1], dtype=cost.dtype, text=2, answer=2), 1)()
    return peak_memory(partial(prepare, asked["model"], cost, asked["frames"]), device)


if __name__ == "__main__":
    print(json.dumps(_memory_here(json.load(sys.stdin))))
