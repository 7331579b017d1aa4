"""Measure time and peak memory of long videos, with one LLaVA-Mini of one token a frame and random weights.

python -m experiments.benchmarks.gpu.long_video --geometry llama-3.1-8b --frames 100 1000 10000 --device cuda
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import logging

from experiments.benchmarks.harness import peak_resident_bytes, write_results
from experiments.benchmarks.model_cost.models import build_models, estimate_models, model_configs, prompt_inputs
from experiments.benchmarks.model_cost.run import device_name, measure_answer
from experiments.config.benchmark_schema import CostConfig
from experiments.cost.architectures import llava_config
from experiments.devices import select_device
from experiments.errors import INPUT_ERRORS, exit_with_error
from experiments.markdown import markdown_table
from experiments.provenance import provenance
from llava_mini.chunk_size import MOST_FRAMES

MINI = "LLaVA-Mini, 1 token"
MIB = 2**20


def measure_long_videos(cost: CostConfig, device: torch.device) -> dict[str, Any]:
    """Answer a question about one video of each length, after one of a chunk of frames that does not count.

    Args:
        cost: Shape, dtype, numbers of frames, tokens of text and answer.
        device: The device to run on.

    Returns:
        The record: `rows` of frames, seconds, and bytes of cache and peak memory; `weights`, `cost`, `machine` and
        `provenance`. The peak is torch's on a GPU, and that of the process so far on any other device.

    Raises:
        ValueError: If the longest video does not fit into memory.
    """
    estimates = estimate_models(cost, device)
    for frames in cost.frames:
        _, needs, fits = estimates[MINI, frames]
        if not fits:
            raise ValueError(f"frames: {frames:,} do not fit into the memory of {device}: {needs}")
    model = build_models(model_configs(cost), cost.dtype, device)[MINI]
    measure_answer(model, prompt_inputs(model, MOST_FRAMES, cost.text), cost.answer, device)
    rows = []
    for frames in cost.frames:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        answer = measure_answer(model, prompt_inputs(model, frames, cost.text), cost.answer, device)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()
        rows.append({"frames": frames, "seconds": answer.seconds, "cache": answer.cache_bytes, "peak": peak})
    return {
        "cost": vars(cost),
        "side": llava_config(cost.geometry, setting="cost.geometry").vision_config.image_size,
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "rows": rows,
        "machine": device_name(device),
        "provenance": provenance(device),
    }


def long_video_markdown(record: dict[str, Any]) -> str:
    """Return the table of a record, with a note on what was measured."""
    rows, bytes_each = [], getattr(torch, record["cost"]["dtype"]).itemsize
    for row in record["rows"]:
        frames, seconds = row["frames"], row["seconds"]
        language_model = seconds["prefill"] + seconds["head"]
        times = [seconds["first token"], 1000 * (seconds["first token"] - language_model) / frames, language_model]
        held = frames * 3 * record["side"] ** 2 * bytes_each
        sizes = [(size / MIB) for size in (row["peak"], row["cache"], held)]
        rows.append([f"{frames:,}", *(f"{x:,.2f}" for x in times), *(f"{x:,.0f}" for x in sizes)])
    columns = [
        "frames",
        "first token, s",
        "a frame, ms",
        "language model, s",
        "peak MiB",
        "cache, MiB",
        "pixels if held, MiB",
    ]
    cost = record["cost"]
    note = (
        f"LLaVA-Mini in the shape {cost['geometry']}, one token a frame, random weights in {cost['dtype']} "
        f"({record['weights'] / MIB:,.0f} MiB, part of the peak), {cost['text']} text tokens. {record['machine']}, one run "
        "of each length. A frame: vision tower, compressor and pre-fusion."
    )
    return f"{markdown_table(columns, rows, columns)}\n\n{note}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write `long_video.json` and its table, print the table, and return the exit status 0."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.gpu.long_video", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--geometry", default="llama-3.1-8b", help="shape of the model (%(default)s)")
    parser.add_argument("--frames", type=int, nargs="+", default=[100, 1000, 10_000], help="frames (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the weights (%(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or mps (%(default)s)")
    parser.add_argument("--results", type=Path, default=Path("results/gpu"), help="folder of the record (%(default)s)")
    arguments = parser.parse_args(argv)
    logging.set_verbosity_error()
    try:
        cost = CostConfig(arguments.geometry, [1], sorted(arguments.frames), dtype=arguments.dtype, answer=2)
        record = measure_long_videos(cost, select_device(arguments.device))
        arguments.results.mkdir(parents=True, exist_ok=True)
        paths = write_results(record, long_video_markdown(record), arguments.results / "long_video")
    except INPUT_ERRORS as error:
        exit_with_error(error)
    print(paths[-1].read_text(), *paths, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
