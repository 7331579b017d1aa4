"""Measure the ratios of CPU time, and compare them with the committed ones.

    python -m experiments.benchmarks.ratios                 # all
    python -m experiments.benchmarks.ratios recording start # some
    python -m experiments.benchmarks.ratios --write         # and commit them: results/bench/ratios.json, docs/performance.md

Each measurement runs in a process of its own, on one thread. A ratio moved if it differs from the committed one by more
than the noise of both together.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import torch

from experiments.benchmarks.harness import run_in_child_process
from experiments.benchmarks.model_cost.run import device_name
from experiments.benchmarks.ratios.comparison import Ratio, comparison_table, read_ratios
from experiments.benchmarks.ratios.measurements import MEASUREMENTS
from experiments.benchmarks.ratios.page import PAGE, replace_table
from experiments.errors import exit_with_error
from experiments.files import write_atomically
from experiments.provenance import ROOT, provenance

RECORD = ROOT / "results" / "bench" / "ratios.json"


def measure_ratios(names: Sequence[str], rounds: int = 0, small: bool = False) -> dict[str, dict[str, Any]]:
    """Measure groups of ratios, each in a process of its own.

    Args:
        names: Keys of `MEASUREMENTS`.
        rounds: Rounds of each; 0 for its own number.
        small: Whether to take tiny sizes.

    Returns:
        By group: `ratios` (`ratio`, `noise` and `rounds` by name), `command`, `machine`, `load` (running processes when
        it began), `date`, `commit`, `torch` and `transformers`.

    Raises:
        RuntimeError: If a process fails.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    origin = provenance()
    record = {}
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        context = {
            "command": f"python -m experiments.benchmarks.ratios {name}",
            "machine": f"{device_name(torch.device('cpu'))}, {os.cpu_count()} cores",
            "load": round(os.getloadavg()[0], 1),
            "date": datetime.now(timezone.utc).date().isoformat(),
            **{key: origin[key] for key in ("commit", "torch", "transformers")},
        }
        request = {"name": name, "rounds": rounds, "small": small}
        times = run_in_child_process("experiments.benchmarks.ratios.measurements", request)
        record[name] = context | {"ratios": {label: asdict(Ratio.of(*pair)) for label, pair in times.items()}}
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the comparison, and return the exit status 0."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.ratios", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("names", nargs="*", help=f"what to measure: {', '.join(MEASUREMENTS)} (all)")
    parser.add_argument("--write", action="store_true", help="replace the committed ratios by the measured ones")
    arguments = parser.parse_args(argv)
    for name in arguments.names:
        if name not in MEASUREMENTS:
            parser.error(f"no measurement '{name}'; use {', '.join(MEASUREMENTS)}")
    try:
        now = measure_ratios(arguments.names or list(MEASUREMENTS))
    except RuntimeError as error:
        exit_with_error(error)
    committed: dict[str, dict[str, Any]] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    before = {name: measured for name, measured in committed.items() if name in now}
    print(comparison_table(read_ratios(before), read_ratios(now)))
    for label, record in (("Committed", before), ("Now", now)):
        machines = dict.fromkeys(f"{m['machine']}, {m['date']}, torch {m['torch']}" for m in record.values())
        print(f"\n{label}: {'; '.join(machines) or 'nothing'}.")
    if arguments.write:
        record = {name: (committed | now)[name] for name in MEASUREMENTS if name in committed | now}
        write_atomically(RECORD, json.dumps(record, indent=1) + "\n")
        write_atomically(PAGE, replace_table(PAGE.read_text(encoding="utf-8"), record))
        print(f"\nwrote {RECORD.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
