"""Measure how long each model of an ablation takes over a question, for the figure of accuracy against latency.

    python -m experiments.benchmarks.prefill_latency --results results

Reads the records, builds each configuration of a model once with the weights that its training started from, and lets all
of them answer one question in turns in one process, so that ratios hold on a machine that does other things too. Writes
`latency.json` into the results folder, where `python -m experiments.report` finds it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, logging

from experiments.benchmarks.harness import in_turns, timed
from experiments.benchmarks.model_cost.models import share
from experiments.benchmarks.model_cost.run import machine
from experiments.config.plain import typed
from experiments.data.load import load_data
from experiments.data.samples import single_questions
from experiments.devices import choose_device
from experiments.evaluation.questions import Questions
from experiments.files import write_atomically
from experiments.models.build import build_model
from experiments.models.token_reduction import Around, in_answering
from experiments.provenance import provenance
from experiments.records import files, views
from experiments.records.latency import FILE, timed_part


def measure(configs: Sequence[Mapping[str, Any]], repeats: int, device: torch.device) -> dict[str, Any]:
    """Seconds of the prefill of the first test question by each of these resolved configurations, in rounds in which
    they take turns, after one that does not count.

    The question comes with its answer, as where its FLOPs were counted; weights, which decide nothing here, are those
    that training starts from, and models on the same one share its parts.

    Returns:
        What `latency.json` holds: `rows` of `config` and `seconds`, `left_out` with the reason for each configuration
        that could not be built, `repeats`, `machine`, `provenance`.
    """
    left_out: list[dict[str, Any]] = []
    runs = dict(_passes(configs, device, left_out))
    in_turns(runs, 1)
    rounds = in_turns(runs, repeats)
    rows = [{"config": json.loads(key), "seconds": rounds[key]} for key in runs]
    found = {"repeats": repeats, "machine": machine(device), "provenance": provenance(device)}
    return found | {"rows": rows, "left_out": left_out}


def _passes(
    configs: Sequence[Mapping[str, Any]], device: torch.device, left_out: list[dict[str, Any]]
) -> Iterator[tuple[str, Callable[[], float]]]:
    """For each that takes a time of its own what to run; those that cannot be built go to `left_out`."""
    bases: dict[str, LlavaForConditionalGeneration] = {}
    for key, plain in {timed_part(config): config for config in configs}.items():
        try:
            config = typed(dict(plain))
            data = load_data(config.data)
            model, processor = build_model(config, data.train)
        except (OSError, ValueError) as error:
            left_out.append({"config": json.loads(key), "error": " ".join(str(error).split())})
            continue
        if isinstance(model, LlavaForConditionalGeneration):
            base = bases.setdefault(json.dumps([plain["model"], plain["data"]], sort_keys=True), model)
            share(model, base)
        first = list(islice(single_questions(data.test.samples), 1))
        asked = Questions(first, processor, 1, device).first()
        asked.pop("labels")
        yield key, partial(_prefill, model.to(device), asked, in_answering(config), device)


@torch.no_grad()
def _prefill(model: Any, asked: dict[str, torch.Tensor], around: Around, device: torch.device) -> float:
    with around(model, asked):
        return timed(lambda: model(**asked, use_cache=True), device)[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if there is nothing to measure or to write into, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.prefill_latency", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="folder that holds records/ (%(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=9, help="rounds that count (%(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or mps (%(default)s)")
    arguments = parser.parse_args(argv)
    logging.set_verbosity_error()
    try:
        if arguments.repeats < 1:
            raise ValueError(f"--repeats: must be at least 1, found {arguments.repeats}")
        finished = files.load(arguments.results / "records").finished
        configs = [record["config"] for record in finished if not views.of_attention(record)]
        found = measure(configs, arguments.repeats, choose_device(arguments.device))
        path = arguments.results / FILE
        if found["rows"]:
            write_atomically(path, json.dumps(found, indent=1) + "\n")
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    for left_out in found["left_out"]:
        print(f"warning: not timed: {left_out['error']}", file=sys.stderr)
    if not found["rows"]:
        print("error: no configuration could be timed", file=sys.stderr)
        return 1
    print(f"{path}: {len(found['rows'])} configurations, {arguments.repeats} rounds, {found['machine']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
