"""Cost of recording attention against a plain forward pass and other tools; `experiment=bench_probe` runs it."""

from experiments.benchmarks.probe_overhead.run import run_overhead_benchmark

__all__ = ["run_overhead_benchmark"]
