"""Measure the prefill time of each model of an ablation, for the figure of accuracy against latency.

    python -m experiments.benchmarks.prefill_latency --results results

Reads the records, and builds each configuration of a model once, with the weights that its training started from. All
models process one question in turns in one process, so their ratios hold on a machine with other load. Writes
`latency.json` into the results folder, where `python -m experiments.report` reads it.
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

from experiments.benchmarks.harness import run_in_turns, time_run
from experiments.benchmarks.model_cost.models import share_llava_parts
from experiments.benchmarks.model_cost.run import device_name
from experiments.config.plain import from_plain
from experiments.data.load import load_data
from experiments.data.samples import single_questions
from experiments.devices import select_device
from experiments.evaluation.questions import EncodedQuestions
from experiments.files import write_atomically
from experiments.models.build import build_model
from experiments.models.token_reduction import TokenDropper, token_dropper_for_inference
from experiments.provenance import provenance
from experiments.records import files, views
from experiments.records.latency import FILE, latency_key


def measure_prefill_latency(configs: Sequence[Mapping[str, Any]], repeats: int, device: torch.device) -> dict[str, Any]:
    """Time the prefill of the first test question for each configuration, in rounds of turns.

    One more round comes first and does not count. The prompt includes the answer, as in the FLOPs count. The weights are
    those that training starts from, since their values do not change the time. Models of the same base share its parts.

    Args:
        configs: Resolved configurations.
        repeats: Rounds that count.
        device: The device to run on.

    Returns:
        The contents of `latency.json`: `rows` of `config` and `seconds`, `left_out` with the reason for each
        configuration that could not be built, `repeats`, `machine` and `provenance`.
    """
    left_out: list[dict[str, Any]] = []
    runs = dict(_prefill_runs(configs, device, left_out))
    run_in_turns(runs, 1)
    rounds = run_in_turns(runs, repeats)
    rows = [{"config": json.loads(key), "seconds": rounds[key]} for key in runs]
    context = {"repeats": repeats, "machine": device_name(device), "provenance": provenance(device)}
    return context | {"rows": rows, "left_out": left_out}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all configurations of a results folder, and write `latency.json`.

    Returns:
        The exit status: 1 if no configuration could be timed or the folder cannot be read or written, else 0.
    """
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
        finished = files.load_records(arguments.results / "records").finished
        configs = [record["config"] for record in finished if not views.is_attention_experiment(record)]
        latencies = measure_prefill_latency(configs, arguments.repeats, select_device(arguments.device))
        path = arguments.results / FILE
        if latencies["rows"]:
            write_atomically(path, json.dumps(latencies, indent=1) + "\n")
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    for left_out in latencies["left_out"]:
        print(f"warning: not timed: {left_out['error']}", file=sys.stderr)
    if not latencies["rows"]:
        print("error: no configuration could be timed", file=sys.stderr)
        return 1
    print(f"{path}: {len(latencies['rows'])} configurations, {arguments.repeats} rounds, {latencies['machine']}")
    return 0


def _prefill_runs(
    configs: Sequence[Mapping[str, Any]], device: torch.device, left_out: list[dict[str, Any]]
) -> Iterator[tuple[str, Callable[[], float]]]:
    """Yield the timed prefill of each configuration, by its latency key.

    Configurations of equal key share one run. Those that cannot be built are appended to `left_out`.
    """
    bases: dict[str, LlavaForConditionalGeneration] = {}
    for key, plain in {latency_key(config): config for config in configs}.items():
        try:
            config = from_plain(dict(plain))
            data = load_data(config.data)
            model, processor = build_model(config, data.train)
        except (OSError, ValueError) as error:
            left_out.append({"config": json.loads(key), "error": " ".join(str(error).split())})
            continue
        if isinstance(model, LlavaForConditionalGeneration):
            base = bases.setdefault(json.dumps([plain["model"], plain["data"]], sort_keys=True), model)
            share_llava_parts(model, base)
        first_sample = list(islice(single_questions(data.test.samples), 1))
        question = EncodedQuestions(first_sample, processor, 1, device).first()
        question.pop("labels")
        yield key, partial(_prefill, model.to(device), question, token_dropper_for_inference(config), device)


@torch.no_grad()
def _prefill(model: Any, question: dict[str, torch.Tensor], token_dropper: TokenDropper, device: torch.device) -> float:
    """Return the seconds of one forward pass over a question, with the tokens dropped that a reduction drops."""
    with token_dropper(model, question):
        return time_run(lambda: model(**question, use_cache=True), device)[0]


if __name__ == "__main__":
    sys.exit(main())
