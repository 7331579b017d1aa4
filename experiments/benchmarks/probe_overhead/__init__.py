"""What recording attention costs beside a plain forward pass, and beside other ways to the same numbers:
`python -m experiments.run experiment=bench_probe`."""

from experiments.benchmarks.probe_overhead.run import run_bench

__all__ = ["run_bench"]
