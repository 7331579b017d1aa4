"""What is gained over running LLaVA-Mini as its released code does: a frame at a time, all pixels held, everything
through every pre-fusion layer, and all of it again for each question.

    python -m experiments.benchmarks.speedups                              # time, FLOPs and difference of each gain
    python -m experiments.benchmarks.speedups long=100,1000,10000          # memory of long videos, a process each

Sizes: width=512 layers=32 prefusion=4 patches=256 text=60 frames=8 repeats=5 held=256. The proportions are those of
LLaVA-Mini on a 7B model. Times are in seconds, the median of the repeats and their range; all ways of running take turns.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, logging
from transformers.masking_utils import create_causal_mask

from experiments.arguments import request, whole
from experiments.benchmarks.harness import in_turns, peak, timed
from experiments.evaluation.flops import counted
from llava_mini import LlavaMiniConfig, LlavaMiniForConditionalGeneration
from llava_mini.prefusion import Prefusion
from probes.hooks.decoder import cache_name

PATCH = 14
IMAGE_TOKEN = 999


@dataclass(frozen=True)
class Request:
    width: str = "512"
    layers: str = "32"
    prefusion: str = "4"
    patches: str = "256"
    text: str = "60"
    frames: str = "8"
    repeats: str = "5"
    held: str = "256"
    long: str = ""


@dataclass(frozen=True)
class Sizes:
    """Of the model and of what it is asked.

    Args:
        width: Of the language model; the tower's is half of it.
        layers, prefusion: Of the language model, and ahead of it.
        patches: Of a frame, a square.
        text: Words of a question.
        frames: Of the video.
    """

    width: int
    layers: int
    prefusion: int
    patches: int
    text: int
    frames: int

    @classmethod
    def read(cls, asked: Request) -> Sizes:
        """Raises ValueError for what is no whole number, patches in no square, or a width that 64 does not divide."""
        sizes = cls(*(whole(name, getattr(asked, name)) for name in cls.__dataclass_fields__))
        side = math.isqrt(sizes.patches)
        if side * side != sizes.patches:
            raise ValueError(f"patches: {sizes.patches} is no square; near it are {side**2} and {(side + 1) ** 2}")
        if sizes.width % 64:
            raise ValueError(f"width: {sizes.width} is no multiple of 64")
        if not sizes.prefusion:
            raise ValueError("prefusion: without such layers there is nothing to gain")
        return sizes

    @property
    def side(self) -> int:
        """Of a frame, in pixels."""
        return PATCH * math.isqrt(self.patches)

    def model(self) -> LlavaMiniForConditionalGeneration:
        torch.manual_seed(0)
        tower = CLIPVisionConfig(
            hidden_size=self.width // 2,
            intermediate_size=self.width * 2,
            num_hidden_layers=6,
            num_attention_heads=self.width // 64,
            image_size=self.side,
            patch_size=PATCH,
        )
        text = LlamaConfig(
            vocab_size=1000,
            hidden_size=self.width,
            intermediate_size=self.width * 43 // 16,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // 64,
            max_position_embeddings=32768,
        )
        config = LlavaMiniConfig(
            vision_config=tower,
            text_config=text,
            image_token_index=IMAGE_TOKEN,
            compressor_heads=self.width // 64,
            prefusion_layers=self.prefusion,
            frames_per_chunk=self.frames,
        )
        return LlavaMiniForConditionalGeneration(config).eval()

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """A question about the video, without its pixels."""
        words = torch.randint(3, IMAGE_TOKEN, (self.text,), generator=torch.Generator().manual_seed(seed))
        ids = torch.cat([words[:1], torch.full((self.frames,), IMAGE_TOKEN), words[1:]])[None]
        return {"input_ids": ids, "visual_layout": torch.tensor([[0, self.frames, 1]])}

    def stream(self) -> Iterator[Tensor]:
        """The video's frames, one at a time."""
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(1, 3, self.side, self.side, generator=generator) for _ in range(self.frames))


class WholePrefusion(nn.Module):
    """The layers of a pre-fusion, run as the released code runs them: over everything, in each call anew."""

    def __init__(self, prefusion: Prefusion) -> None:
        super().__init__()
        self.layers, self.config = prefusion.layers, prefusion.config

    def forward(
        self, visual: Tensor, text: Tensor, rotary_emb: nn.Module, *, unread: int = 0, past: None = None
    ) -> tuple[Tensor, Tensor]:
        hidden_states = torch.cat([visual, text], dim=1)
        position_ids = torch.arange(hidden_states.shape[1])[None]
        mask = create_causal_mask(self.config, hidden_states, None, None)
        positions = rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, attention_mask=mask, position_ids=position_ids, position_embeddings=positions
            )
        return hidden_states[:, unread : visual.shape[1]], hidden_states[:, visual.shape[1] :]


Way = Callable[[], Tensor]


@torch.no_grad()
def measured(ways: dict[str, Way], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, in turns, after one turn that does not count."""
    runs = {name: partial(timed, way) for name, way in ways.items()}
    in_turns(runs, 1)
    return {name: [seconds for seconds, _ in turns] for name, turns in in_turns(runs, repeats).items()}


def ways_of_running(sizes: Sizes) -> dict[str, Way]:
    """What leads to the language model's input, and the language model's pass over it, from the same weights."""
    model = sizes.model()
    inner: Any = model.model
    ours, plainly = inner.prefusion, WholePrefusion(inner.prefusion)
    pixels = torch.cat(list(sizes.stream()))
    question = sizes.inputs()
    with torch.no_grad():
        pictures = model.encode_pictures(pixels, question["visual_layout"])

    def run(prefusion: nn.Module, chunk: int, **asked: Any) -> Tensor:
        inner.prefusion, model.config.frames_per_chunk = prefusion, chunk
        return inner.fuse(**question, **asked)[0]

    def anew() -> Tensor:
        return run(ours, sizes.frames, pictures=model.encode_pictures(pixels, question["visual_layout"]))

    embeds = run(plainly, 1, pixel_values=pixels).detach()
    return {
        "frame by frame, whole": lambda: run(plainly, 1, pixel_values=pixels),
        "batched, whole": lambda: run(plainly, sizes.frames, pixel_values=pixels),
        "frame by frame, last layer's rows": lambda: run(ours, 1, pixel_values=pixels),
        "batched, last layer's rows": lambda: run(ours, sizes.frames, pixel_values=pixels),
        "first question, kept for more": anew,
        "second question": lambda: run(ours, sizes.frames, pictures=pictures),
        "language model": lambda: model(inputs_embeds=embeds, logits_to_keep=1).logits,
    }


def gains(sizes: Sizes, repeats: int) -> list[list[str]]:
    """A row for each way of running: seconds, FLOPs, both as shares of the released code's way, and the greatest
    difference of what the language model gets, in its standard deviations."""
    ways = ways_of_running(sizes)
    seconds = measured(ways, repeats)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    flops = {name: counted(way)[0] for name, way in ways.items()}
    first = next(iter(ways))
    with torch.no_grad():
        expected = ways[first]()
        changed = {name: way() for name, way in ways.items()}
    rows = []
    for name, times in seconds.items():
        row = [name, f"{median[name]:.3f} ({min(times):.3f} to {max(times):.3f})", f"{flops[name] / 1e9:.2f}"]
        row += [f"{median[name] / median[first]:.3f}", f"{flops[name] / flops[first]:.3f}"]
        same = changed[name].shape == expected.shape
        rows.append([*row, f"{float((changed[name] - expected).abs().max() / expected.std()):.1e}" if same else ""])
    asked, whole_model = median["second question"], median["language model"]
    share = (asked + whole_model) / (median[first] + whole_model)
    rows.append(["second question, with the language model", "", "", f"{share:.3f}", "", ""])
    return rows


@dataclass(frozen=True)
class Memory:
    """Bytes that a process takes at most, beyond what it held with libraries and model loaded: up to where the language
    model starts, and with its answer."""

    fused: int
    answered: int


@torch.inference_mode()
def memory(sizes: Sizes, pixels: str) -> Memory:
    """Of this process while it answers one question about the video, its pixels "streamed" or "held"; or with "none" a
    prompt of as many words."""
    logging.set_verbosity_error()
    model: Any = sizes.model()
    model.config.frames_per_chunk = min(sizes.frames, 8)
    inputs = sizes.inputs()
    before = peak()
    if pixels == "none":
        embeds = model.model.embed(inputs["input_ids"] % IMAGE_TOKEN)
    else:
        frames: Any = torch.cat(list(sizes.stream())) if pixels == "held" else sizes.stream()
        embeds = model.model.fuse(**inputs, pixel_values=frames)[0]
    fused = peak()
    answer = model(inputs_embeds=embeds, logits_to_keep=1)
    name = cache_name(answer)
    model(input_ids=answer.logits.argmax(-1), **{name: answer[name]})
    return Memory(fused - before, peak() - before)


def memories(runs: list[tuple[Sizes, str]]) -> list[Memory]:
    """Each in a process of its own, one after the other."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        return list(pool.map(memory, *zip(*runs, strict=True)))


def pixels_held(sizes: Sizes) -> list[list[str]]:
    kinds = ["held", "streamed"]
    found = memories([(sizes, kind) for kind in kinds])
    return [[kind, str(sizes.frames), f"{one.fused / 2**20:,.0f}"] for kind, one in zip(kinds, found, strict=True)]


def long_videos(sizes: list[Sizes]) -> list[list[str]]:
    """A row for each video: frames; MiB ahead of the language model, and with the answer; with the answer to as many
    words; of the pixels, were they held."""
    found = memories([(size, kind) for size in sizes for kind in ("streamed", "none")])
    rows = []
    for size, video, words in zip(sizes, found[::2], found[1::2], strict=True):
        taken = [video.fused, video.answered, words.answered, size.frames * 3 * size.side**2 * 4]
        rows.append([f"{size.frames:,}", *(f"{value / 2**20:,.1f}" for value in taken)])
    return rows


def table(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows])


def main() -> None:
    logging.set_verbosity_error()
    try:
        asked = request(sys.argv[1:], Request)
        sizes = Sizes.read(asked)
        lengths = [whole("long", length) for length in asked.long.split(",")] if asked.long else []
        repeats, held = whole("repeats", asked.repeats), whole("held", asked.held)
    except ValueError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    if lengths:
        small = [Sizes(128, 4, 2, 64, 20, length) for length in lengths]
        print("A small model, its frames streamed. MiB taken beyond libraries and weights:\n")
        columns = ["frames", "ahead of the language model", "with its answer", "as many words instead", "pixels held"]
        print(table(columns, long_videos(small)))
        return
    print(f"{sizes}, {torch.get_num_threads()} threads. What happens ahead of the language model:\n")
    columns = ["way of running", "seconds", "GFLOPs", "share of seconds", "share of FLOPs", "difference"]
    print(table(columns, gains(sizes, repeats)))
    print("\nMiB taken for the pixels of a longer video and what is made of them:\n")
    longer = Sizes(sizes.width, 1, sizes.prefusion, sizes.patches, sizes.text, held)
    print(table(["pixels", "frames", "MiB"], pixels_held(longer)))


if __name__ == "__main__":
    main()
