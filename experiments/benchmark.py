"""Answer public benchmarks with a saved model: `python -m experiments.benchmark MODEL --tasks gqa,pope`.

It runs the cell of `python -m experiments.run model=checkpoint model.path=MODEL data=lmms data.tasks=[gqa,pope]`, so it
resumes, and writes the same record (docs/benchmarks.md). `experiments.benchmarks` is something else: time and memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from experiments import run


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. The exit status is 0 if every task has a score."""
    sys.argv[1:] = benchmark_overrides(arguments)
    run.main()


def benchmark_overrides(arguments: Sequence[str] | None = None) -> list[str]:
    """Return the overrides of `python -m experiments.run` that a command line stands for.

    Args:
        arguments: The words of the command line, by default those of this program.

    Example:
        >>> benchmark_overrides(["asset:tiny", "--tasks", "gqa,pope", "--limit", "8"])
        ['model=checkpoint', 'data=lmms', 'retry_failed=true', "model.path='asset:tiny'", "data.tasks=['gqa','pope']", 'data.test_samples=8']
    """
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmark", description=__doc__)
    parser.add_argument("model", help="folder, model hub name, or asset:NAME")
    parser.add_argument("--tasks", required=True, type=_names, help="tasks and groups of lmms-eval: gqa,pope")
    parser.add_argument("--limit", type=_count, help="documents of each task; all by default")
    parser.add_argument(
        "--include", action="append", default=[], help="folder with further task files; may be repeated"
    )
    parser.add_argument("--batch-size", type=_count, help="requests of a batch")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--dtype", help="weights as float32, bfloat16 or float16")
    parser.add_argument("--results", help="folder of the records; results by default")
    given = parser.parse_args(arguments)
    settings = {
        "model.path": _quoted(given.model),
        "data.tasks": _quoted_list(given.tasks),
        "data.test_samples": given.limit,
        "data.include": _quoted_list(given.include) if given.include else None,
        "batch_size": given.batch_size,
        "device": given.device,
        "model.dtype": given.dtype,
        "results": given.results and _quoted(given.results),
    }
    # The command is run to get a result, so an earlier failure is no reason not to try.
    overrides = ["model=checkpoint", "data=lmms", "retry_failed=true"]
    return overrides + [f"{key}={value}" for key, value in settings.items() if value is not None]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, found '{text}'")
    return int(text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _quoted_list(texts: Sequence[str]) -> str:
    return f"[{','.join(map(_quoted, texts))}]"


def _quoted(text: str) -> str:
    """Return a text as a value in Hydra's grammar, in which a path may hold any character."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


if __name__ == "__main__":
    main()
