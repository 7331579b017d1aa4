"""Measure what curves over layers cost: removal, onset and knock-out, against a forward pass for each point.

    python -m experiments.benchmarks.curves --rounds 3

A naive curve of L layers takes L + 1 passes. Two models: the tiny LLaVA that ships with the project, with 16 questions
about one image; and random weights of 12 layers of width 384, a CLIP of 4 layers of width 256, 144 patches and 30 text
tokens, with one question and with four. Times are CPU seconds of one thread; all runs of a model take turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    logging,
)

from experiments.benchmarks.harness import cpu_seconds, run_in_turns
from experiments.markdown import markdown_table
from probes import TokenMap
from probes.ask import encode_prompt
from probes.fusion.curves import knockout_curve, removal_curve
from probes.fusion.onset import onset_curve
from probes.hooks.decoder import decoder_layers, find_decoder
from probes.loading import load_model

ASSETS = Path(__file__).resolve().parents[1] / "assets"
PATCH_PIXELS, IMAGE_TOKEN, ANSWER = 14, 999, 5
CURVES = {"removal": removal_curve, "onset": onset_curve, "knock-out": knockout_curve}

ModelAndInputs = tuple[PreTrainedModel, dict[str, Tensor]]


def random_llava(questions: int, layers: int = 12, width: int = 384, side: int = 12, text: int = 30) -> ModelAndInputs:
    """Return a LLaVA with random weights, and questions about an image each.

    Args:
        questions: Rows of the batch.
        layers: Layers of the language model.
        width: Its width, a multiple of 64.
        side: Patches along a side of an image.
        text: Text tokens of a question, 5 of them ahead of the image.
    """
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=PATCH_PIXELS * side,
        patch_size=PATCH_PIXELS,
    )
    decoder = LlamaConfig(
        vocab_size=IMAGE_TOKEN + 1,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )
    config = LlavaConfig(vision_config=vision, text_config=decoder, image_token_index=IMAGE_TOKEN)
    words = torch.randint(3, IMAGE_TOKEN, (questions, text))
    ids = torch.cat([words[:, :5], torch.full((questions, side**2), IMAGE_TOKEN), words[:, 5:]], dim=1)
    pixels = torch.randn(questions, 3, vision.image_size, vision.image_size)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return LlavaForConditionalGeneration(config).eval(), inputs


def shipped_llava(questions: int) -> ModelAndInputs:
    """Return the tiny LLaVA that ships with the project, and one question about one image this many times."""
    model, processor = load_model(str(ASSETS / "tiny"))
    with Image.open(ASSETS / "scene.png") as image:
        inputs = encode_prompt(model, processor, "what shape is right of the green ring?", [image])
    return model, {name: value.repeat(questions, *[1] * (value.ndim - 1)) for name, value in inputs.items()}


MODELS: dict[str, Callable[[], ModelAndInputs]] = {
    "tiny, 6 layers, 16 questions": partial(shipped_llava, 16),
    "12 layers, 1 question": partial(random_llava, 1),
    "12 layers, 4 questions": partial(random_llava, 4),
}


def curve_runs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    """Return a forward pass, named "pass", and each of `CURVES` on the same inputs, with all their points."""
    tokens = TokenMap.from_inputs(model, inputs)
    last = torch.tensor([inputs["input_ids"].shape[1] - 1])
    inputs = inputs | {"logits_to_keep": last}

    def score(logits: Tensor) -> Tensor:
        return logits[:, -1].float().log_softmax(dim=-1)[:, ANSWER]

    runs: dict[str, Callable[[], Any]] = {"pass": partial(model, **inputs, use_cache=False)}
    return runs | {name: partial(curve, model, tokens, inputs, score) for name, curve in CURVES.items()}


@torch.no_grad()
def measure_curves(model: PreTrainedModel, inputs: dict[str, Tensor], rounds: int) -> dict[str, float]:
    """Return each curve's CPU time in forward passes: the minimum of its rounds over that of a pass.

    Args:
        model: A LLaVA.
        inputs: Arguments of its forward call.
        rounds: Rounds that count, after one that does not.
    """
    runs = {name: partial(cpu_seconds, run) for name, run in curve_runs(model, inputs).items()}
    run_in_turns(runs, 1)
    seconds = {name: min(times) for name, times in run_in_turns(runs, rounds).items()}
    return {name: seconds[name] / seconds["pass"] for name in CURVES}


def curve_ratios(rounds: int = 3, names: Sequence[str] = tuple(MODELS)) -> dict[str, float]:
    """Return each curve's share of the time of a naive curve, by "model, curve".

    Args:
        rounds: Rounds that count.
        names: Keys of `MODELS`.
    """
    return {curve: passes / points for curve, passes, points in _passes(rounds, names)}


def _passes(rounds: int, names: Sequence[str]) -> Iterator[tuple[str, float, int]]:
    """Yield "model, curve", the forward passes that the curve takes, and those of a naive curve."""
    for name in names:
        model, inputs = MODELS[name]()
        points = len(decoder_layers(find_decoder(model))) + 1
        for curve, passes in measure_curves(model, inputs, rounds).items():
            yield f"{name}, {curve}", passes, points


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and return the exit status 0."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.curves", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count (%(default)s)")
    rounds = parser.parse_args(argv).rounds
    if rounds < 1:
        parser.error(f"--rounds: must be at least 1, found {rounds}")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = [
        [curve, str(points), f"{passes:.2f}", f"{passes / points:.2f}"]
        for curve, passes, points in _passes(rounds, tuple(MODELS))
    ]
    columns = ["curve", "naive, passes", "this project, passes", "ratio"]
    print(markdown_table(columns, rows, columns[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
