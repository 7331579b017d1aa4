"""Former name of the command `python -m experiments.benchmarks.speedups`."""

from __future__ import annotations

from experiments.cost.moved_command import exit_with_new_name

if __name__ == "__main__":
    exit_with_new_name("experiments.benchmarks.speedups")
