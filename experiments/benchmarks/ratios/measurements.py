"""The measured ratios: groups of runs that take turns in one process, on one thread.

Times are CPU seconds of the process, so other load on the machine does not count as such. It still slows a run, through
caches and memory that are shared, but the runs of a round alike.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import logging

from experiments.benchmarks import released_ratio
from experiments.benchmarks.curves import curve_runs, random_llava
from experiments.benchmarks.harness import cpu_seconds, run_in_turns
from experiments.benchmarks.model_cost.models import build_models, model_configs, prompt_inputs
from experiments.benchmarks.probe_overhead import modes
from experiments.benchmarks.speedups import BenchmarkSizes, build_variants
from experiments.config.benchmark_schema import BenchModel, CostConfig

Runs = dict[str, Callable[[], object]]
Rounds = dict[str, tuple[Sequence[float], Sequence[float]]]
"""By ratio: the CPU seconds of what is measured in each round, and those of what it is compared with."""


@dataclass(frozen=True)
class Measurement:
    """A group of ratios that are measured in one process.

    Args:
        measure: Returns the CPU seconds by ratio. It is given a number of rounds, and whether to take tiny sizes.
        rounds: Number of rounds.
        meaning: What is divided by what.
    """

    measure: Callable[[int, bool], Rounds]
    rounds: int
    meaning: str


@torch.no_grad()
def time_in_turns(runs: Runs, reference: str, rounds: int) -> Rounds:
    """Time each run in turns, after one round that does not count, and compare all with one of them."""
    run_in_turns(runs, 1)
    times = run_in_turns({name: partial(cpu_seconds, run) for name, run in runs.items()}, rounds)
    return {name: (seconds, times[reference]) for name, seconds in times.items() if name != reference}


def released(rounds: int, small: bool) -> Rounds:
    """Compare first and second questions about an image and four frames with the released code's computation."""
    model: Any = released_ratio.build_model(64, 64, 4) if small else released_ratio.build_model()
    ratios: Rounds = {}
    for frames, label in ((1, "one image"), (4, "4 frames")):
        inputs = released_ratio.make_inputs(model, frames)
        with torch.no_grad():
            encoded = model.encode_pictures(inputs["pixel_values"], inputs["visual_layout"])
        runs: Runs = {
            "released": partial(released_ratio.released_logits, model, **inputs),
            f"{label}, first question": partial(model, **inputs),
            f"{label}, second question": partial(model, input_ids=inputs["input_ids"], pictures=encoded),
        }
        ratios |= time_in_turns(runs, "released", rounds)
    return ratios


def prefill(rounds: int, small: bool) -> Rounds:
    """Compare the time to the first token of LLaVA-Mini and LLaVA, on the same weights."""
    cost = CostConfig("tiny" if small else "smol", [1, 4], [1])
    models = build_models(model_configs(cost), "float32", torch.device("cpu"))
    runs: Runs = {
        name: partial(model, **prompt_inputs(model, 1, cost.text), use_cache=True, logits_to_keep=1)
        for name, model in models.items()
    }
    return time_in_turns(runs, "LLaVA", rounds)


def recording(rounds: int, small: bool) -> Rounds:
    """Compare a forward pass with recorded attention with one without."""
    shape = BenchModel("12 heads of 64", heads=12, head_width=64, mlp=2048, layers=3, of_layers=12)
    if small:
        shape = replace(shape, heads=2, head_width=16, mlp=32)
    llama = modes.build_llama(shape, 32000, "float32", torch.device("cpu"))
    ids, tokens = modes.prompt_tokens(llama, 16 if small else 576, 64)
    names = ("plain", "mass", "text", "all", "contribution")
    return time_in_turns({name: modes.prepare_mode(name, llama, ids, tokens) for name in names}, "plain", rounds)


def steps(rounds: int, small: bool) -> Rounds:
    """Compare each step of this implementation up to the language model's input with the released way."""
    sizes = BenchmarkSizes(64, 1, 2, 16, 5, 3) if small else BenchmarkSizes(256, 4, 4, 64, 60, 8)
    variants: Runs = {name: run for name, run in build_variants(sizes).items() if name != "language model"}
    return time_in_turns(variants, next(iter(variants)), rounds)


def curves(rounds: int, small: bool) -> Rounds:
    """Compare curves over the layers with a forward pass for each of their points."""
    model, inputs = random_llava(1, layers=2, width=64, side=2) if small else random_llava(1)
    points = model.config.get_text_config().num_hidden_layers + 1
    times = time_in_turns(curve_runs(model, inputs), "pass", rounds)
    return {name: (seconds, [points * one for one in passes]) for name, (seconds, passes) in times.items()}


def video(rounds: int, small: bool) -> Rounds:
    """Compare the time of a frame in a streamed video of 64 frames with that in one of 8."""
    lengths = (4, 2) if small else (64, 8)

    def encode(sizes: BenchmarkSizes, model: Any) -> object:
        return model.model.fuse(**sizes.inputs(), pixel_values=sizes.stream())

    runs: Runs = {}
    for frames in lengths:
        sizes = BenchmarkSizes(128, 4, 2, 64, 20, frames)
        model = sizes.model()
        model.config.frames_per_chunk = min(frames, 8)
        runs[f"{frames} frames"] = partial(encode, sizes, model)
    (seconds, reference), (frames, fewer) = time_in_turns(runs, f"{lengths[1]} frames", rounds).popitem()[1], lengths
    return {f"{frames} frames": ([x / frames for x in seconds], [x / fewer for x in reference])}


def start_up(rounds: int, small: bool) -> Rounds:
    """Compare starting each command, and importing each package, with importing torch and transformers."""
    imports = "from transformers import LlamaForCausalLM"
    commands = {
        "torch and transformers": ["-c", imports],
        "import probes": ["-c", "import probes"],
        "import llava_mini": ["-c", "from llava_mini import LlavaMiniForConditionalGeneration"],
    }
    if not small:
        empty = tempfile.gettempdir()
        commands |= {
            "run --help": ["-m", "experiments.run", "--help"],
            "status of a sweep": ["-m", "experiments.status", "experiment=table6_prefusion", f"results={empty}"],
            "report --help": ["-m", "experiments.report", "--help"],
            "probes --help": ["-m", "probes", "--help"],
        }
    times = run_in_turns({name: partial(_child_cpu_seconds, words) for name, words in commands.items()}, rounds)
    reference = times.pop("torch and transformers")
    return {name: (seconds, reference) for name, seconds in times.items()}


def _child_cpu_seconds(words: Sequence[str]) -> float:
    """Return the CPU seconds of one Python process, user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


MEASUREMENTS: Mapping[str, Measurement] = {
    "released": Measurement(released, 7, "this project over the released code's computation, on the same weights"),
    "prefill": Measurement(prefill, 7, "LLaVA-Mini over LLaVA in the smol shape, one image, to the first token"),
    "recording": Measurement(
        recording, 9, "a forward pass that records attention over one that does not, 576 + 64 tokens"
    ),
    "steps": Measurement(
        steps, 9, "up to the language model: each step over frame by frame, all tokens in all pre-fusion layers"
    ),
    "curves": Measurement(curves, 5, "a curve over 12 layers over a forward pass for each of its 13 points"),
    "video": Measurement(video, 9, "a frame of a streamed video over a frame of one of 8, up to the language model"),
    "start": Measurement(start_up, 5, "starting a process over importing torch and transformers"),
}


def _measure_in_this_process(request: dict[str, Any]) -> Rounds:
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    measurement = MEASUREMENTS[request["name"]]
    return measurement.measure(request["rounds"] or measurement.rounds, request["small"])


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1"}  # of the processes that `start_up` starts
    print(json.dumps(_measure_in_this_process(json.load(sys.stdin))))
