"""The steps of the run on a GPU: their commands and time limits, and running one of them in a process of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

OUTPUT_LINES = 25


@dataclass(frozen=True)
class Step:
    """One command of the run.

    Args:
        name: Name of its record.
        title: What it measures.
        arguments: What follows `python -m`.
        limit: Seconds after which it is ended.
    """

    name: str
    title: str
    arguments: Sequence[str]
    limit: int


def gpu_steps(device: str, results: Path, small: bool = False) -> list[Step]:
    """Return the steps, whose time limits add up to less than ten minutes.

    A small run takes float32, because a CPU multiplies bfloat16 slowly, and one shape, because both are then tiny.

    Args:
        device: "cuda", or "cpu" to try the run where there is no GPU.
        results: The folder that they write into.
        small: Whether to take tiny models and short videos.

    Example:
        >>> [step.name for step in gpu_steps("cuda", Path("results/gpu"))]
        ['tests', 'cost-7b', 'cost-8b', 'long-video', 'recording']
    """
    common = (f"device={device}", f"results={results}")
    selected = "cuda" if device.startswith("cuda") else "cpu or fake"
    shapes = {"cost-7b": "llava-1.5-7b", "cost-8b": "llama-3.1-8b"}
    frames, visual, dtype = (100, 1000, 10_000), "576,2880,7290", "bfloat16"
    model = "{name: 8 of 32 layers of LLaVA-1.5-7B, heads: 32, head_width: 128, mlp: 11008, layers: 8, of_layers: 32}"
    if small:
        shapes, frames, visual, dtype = {"cost-tiny": "tiny"}, (4, 20, 100), "40,80", "float32"
        model = "{name: small, heads: 2, head_width: 16, mlp: 64, layers: 2, of_layers: 4}"

    def cost(shape: str) -> tuple[str, ...]:
        settings = (f"cost.geometry={shape}", f"cost.dtype={dtype}", "cost.sizes=[1]", "cost.frames=[1]")
        return ("experiments.run", "experiment=cost", *settings, *common)

    video_shape = ("--geometry", "tiny" if small else "llama-3.1-8b", "--dtype", dtype)
    video = (*video_shape, "--frames", *map(str, frames), "--device", device, "--results", str(results))
    recording = ("bench.modes=[plain,all,output_attentions]", f"bench.visual=[{visual}]", f"bench.dtype={dtype}")
    steps = [
        Step("tests", "Tests", ("pytest", "-rs", "-p", "no:cacheprovider", "tests/devices", "-k", selected), 100),
        *(Step(name, f"LLaVA and LLaVA-Mini in the shape {shape}", cost(shape), 100) for name, shape in shapes.items()),
        Step("long-video", "A long video", ("experiments.benchmarks.gpu.long_video", *video), 150),
        Step(
            "recording",
            "Recording attention",
            ("experiments.run", "experiment=bench_probe", *recording, f"bench.models=[{model}]", *common),
            130,
        ),
    ]
    # A small run is a trial, on a machine that may be slow.
    return [replace(step, limit=600) for step in steps] if small else steps


# prctl(2) of Linux, looked up ahead of a fork; None on other systems.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """Let the kernel kill this process when its parent is killed, so that no step is left alone on the GPU."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run_step(step: Step, results: Path) -> dict[str, Any]:
    """Run a step in a process of its own, without network, and return what came of it.

    Args:
        step: The step.
        results: The folder that it writes into.

    Returns:
        `status` ("finished", "out of memory", "timed out" or "failed"), `started`, `seconds`, the last lines of its
        `output`, and the `files` that it wrote, relative to `results`.
    """
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    started, start = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.time()
    process = subprocess.Popen(
        [sys.executable, "-m", *step.arguments],
        env={**os.environ, **offline},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that the processes that it starts end with it
        preexec_fn=_end_with_parent,
    )
    try:
        output, status = process.communicate(timeout=step.limit)[0], "failed" if process.returncode else "finished"
        if process.returncode and "out of memory" in output.lower():
            status = "out of memory"
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        output, status = process.communicate()[0], "timed out"
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
    files = [path for path in results.rglob("*") if path.is_file() and path.stat().st_mtime >= start]
    return {
        "status": status,
        "started": started,
        "seconds": round(time.time() - start, 1),
        "output": output.strip().splitlines()[-OUTPUT_LINES:],
        "files": sorted(path.relative_to(results).as_posix() for path in files),
    }
