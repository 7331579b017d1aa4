"""Run on a GPU what needs one: tests, cost of 7B and 8B shapes, a long video, and the cost of recording attention.

    python -m experiments.benchmarks.gpu                                              # under ten minutes, on CUDA
    python -m experiments.benchmarks.gpu --small --device cpu --results FOLDER        # tries it with tiny models

Writes `steps/NAME.json` for each step, what the steps write themselves, and the page README.md. A step whose record is
finished, with the same code, torch, device and command, is not run again.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks.gpu.page import STEPS_FOLDER, gpu_page, read_step_records
from experiments.benchmarks.gpu.steps import Step, gpu_steps, run_step
from experiments.benchmarks.model_cost.run import device_name
from experiments.devices import select_device
from experiments.errors import INPUT_ERRORS, exit_with_error
from experiments.files import write_atomically
from experiments.provenance import RECORD_SOURCES, code_version

SOURCES = (*RECORD_SOURCES, "experiments/benchmarks", "tests/devices")


def run_gpu_steps(steps: Sequence[Step], results: Path, device: torch.device) -> dict[str, dict[str, Any]]:
    """Run the steps that are not finished, and write their records and the page after each.

    Args:
        steps: The steps.
        results: The folder of records and page.
        device: The device of the steps.

    Returns:
        The records by the name of the step.
    """
    (results / STEPS_FOLDER).mkdir(parents=True, exist_ok=True)
    records = read_step_records(results)
    for number, step in enumerate(steps, 1):
        fingerprint = {
            "code": code_version(sources=SOURCES),
            "torch": version("torch"),
            "device": device_name(device),
            "command": list(step.arguments),
        }
        old = records.get(step.name)
        progress = f"{number} of {len(steps)}: {step.title}"
        if old and old["status"] == "finished" and old["fingerprint"] == fingerprint:
            print(f"{progress}: finished before", flush=True)
            continue
        print(f"{progress}, at most {step.limit} s ...", flush=True)
        for name in old["files"] if old else ():
            (results / name).unlink(missing_ok=True)
        context = {"fingerprint": fingerprint, "on_gpu": device.type == "cuda"}
        records[step.name] = run_step(step, results) | context
        record = json.dumps(records[step.name], indent=1) + "\n"
        write_atomically(results / STEPS_FOLDER / f"{step.name}.json", record)
        write_atomically(results / "README.md", gpu_page(steps, records, results))
        print(f"  {records[step.name]['status']} after {records[step.name]['seconds']:.0f} s", flush=True)
    write_atomically(results / "README.md", gpu_page(steps, records, results))
    return records


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps, and return the exit status: 0 if all are finished, 130 after an interruption."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.gpu", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --small (%(default)s)")
    parser.add_argument("--small", action="store_true", help="tiny models and short videos")
    parser.add_argument("--results", type=Path, default=Path("results/gpu"), help="folder of records (%(default)s)")
    arguments = parser.parse_args(argv)
    try:
        device = select_device(arguments.device)
        steps = gpu_steps(arguments.device, arguments.results, arguments.small)
        records = run_gpu_steps(steps, arguments.results, device)
    except INPUT_ERRORS as error:
        exit_with_error(error)
    except KeyboardInterrupt:
        print("interrupted: the same command resumes", file=sys.stderr)
        return 128 + signal.SIGINT
    unfinished = [step.name for step in steps if records[step.name]["status"] != "finished"]
    print(f"{arguments.results / 'README.md'}: {len(steps) - len(unfinished)} of {len(steps)} steps finished")
    return int(bool(unfinished))


if __name__ == "__main__":
    sys.exit(main())
