"""Measure the speedups over the released way of running LLaVA-Mini.

The released code processes one frame at a time, holds all pixels, passes all tokens through every pre-fusion layer, and
repeats everything for each question.

    python -m experiments.benchmarks.speedups                              # time, FLOPs and difference of each variant
    python -m experiments.benchmarks.speedups long=100,1000,10000          # memory of long videos, in separate processes

Sizes: width=512 layers=32 prefusion=4 patches=256 text=60 frames=8 repeats=5 held=256. The proportions are those of
LLaVA-Mini on a 7B model. Times are in seconds: the median of the repeats, and their range. All variants take turns.
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

from experiments.arguments import parse_arguments, parse_count
from experiments.benchmarks.harness import peak_resident_bytes, run_in_turns, time_run
from experiments.evaluation.flops import count_flops
from experiments.markdown import markdown_table
from llava_mini import LlavaMiniConfig, LlavaMiniForConditionalGeneration
from llava_mini.prefusion import Prefusion
from probes.hooks.decoder import cache_name

PATCH_PIXELS = 14
IMAGE_TOKEN = 999

Variant = Callable[[], Tensor]


@dataclass(frozen=True)
class SpeedupRequest:
    """The options of the command line, as text."""

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
class BenchmarkSizes:
    """Sizes of the model, the video and the question.

    Args:
        width: Width of the language model. The vision tower has half of it.
        layers: Layers of the language model.
        prefusion: Pre-fusion layers.
        patches: Patches of a frame, a square number.
        text: Text tokens of the question.
        frames: Frames of the video.
    """

    width: int
    layers: int
    prefusion: int
    patches: int
    text: int
    frames: int

    @classmethod
    def read(cls, request: SpeedupRequest) -> BenchmarkSizes:
        """Return the sizes of a request.

        Raises:
            ValueError: If a size is no whole number, the patches form no square, 64 does not divide the width, or there
                is no pre-fusion layer.
        """
        sizes = cls(*(parse_count(name, getattr(request, name)) for name in cls.__dataclass_fields__))
        side = math.isqrt(sizes.patches)
        if side * side != sizes.patches:
            raise ValueError(
                f"patches: {sizes.patches} is no square number; the nearest are {side**2} and {(side + 1) ** 2}"
            )
        if sizes.width % 64:
            raise ValueError(f"width: {sizes.width} is no multiple of 64")
        if not sizes.prefusion:
            raise ValueError("prefusion: 0 layers leave nothing to speed up; use at least 1")
        return sizes

    @property
    def pixels(self) -> int:
        """Side of a frame in pixels."""
        return PATCH_PIXELS * math.isqrt(self.patches)

    def model(self) -> LlavaMiniForConditionalGeneration:
        """Return a LLaVA-Mini of these sizes with random weights."""
        torch.manual_seed(0)
        vision = CLIPVisionConfig(
            hidden_size=self.width // 2,
            intermediate_size=self.width * 2,
            num_hidden_layers=6,
            num_attention_heads=self.width // 64,
            image_size=self.pixels,
            patch_size=PATCH_PIXELS,
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
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE_TOKEN,
            compressor_heads=self.width // 64,
            prefusion_layers=self.prefusion,
            frames_per_chunk=self.frames,
        )
        return LlavaMiniForConditionalGeneration(config).eval()

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """Return the token IDs and the layout of a question about the video, without its pixels."""
        text_ids = torch.randint(3, IMAGE_TOKEN, (self.text,), generator=torch.Generator().manual_seed(seed))
        ids = torch.cat([text_ids[:1], torch.full((self.frames,), IMAGE_TOKEN), text_ids[1:]])[None]
        return {"input_ids": ids, "visual_layout": torch.tensor([[0, self.frames, 1]])}

    def stream(self) -> Iterator[Tensor]:
        """Yield the frames of the video, each of shape (1, 3, pixels, pixels)."""
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(1, 3, self.pixels, self.pixels, generator=generator) for _ in range(self.frames))


class WholePrefusion(nn.Module):
    """Run the layers of a pre-fusion as the released code does: over all tokens, with no keys and values reused.

    Args:
        prefusion: The pre-fusion whose layers to run.
    """

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


@dataclass(frozen=True)
class PeakMemory:
    """Peak bytes of a process beyond its size with libraries and model loaded.

    Args:
        fused: The peak up to the start of the language model.
        answered: The peak including the answer.
    """

    fused: int
    answered: int


def build_variants(sizes: BenchmarkSizes) -> dict[str, Variant]:
    """Return the ways to compute the language model's input, and a pass of the language model, on the same weights."""
    model = sizes.model()
    inner: Any = model.model
    prefusion, whole_prefusion = inner.prefusion, WholePrefusion(inner.prefusion)
    pixels = torch.cat(list(sizes.stream()))
    question = sizes.inputs()
    with torch.no_grad():
        encoded = model.encode_pictures(pixels, question["visual_layout"])

    def fuse(module: nn.Module, chunk: int, **images: Any) -> Tensor:
        inner.prefusion, model.config.frames_per_chunk = module, chunk
        return inner.fuse(**question, **images)[0]

    def encode_and_fuse() -> Tensor:
        return fuse(prefusion, sizes.frames, pictures=model.encode_pictures(pixels, question["visual_layout"]))

    embeds = fuse(whole_prefusion, 1, pixel_values=pixels).detach()
    return {
        "frame by frame, whole": lambda: fuse(whole_prefusion, 1, pixel_values=pixels),
        "batched, whole": lambda: fuse(whole_prefusion, sizes.frames, pixel_values=pixels),
        "frame by frame, last layer's rows": lambda: fuse(prefusion, 1, pixel_values=pixels),
        "batched, last layer's rows": lambda: fuse(prefusion, sizes.frames, pixel_values=pixels),
        "first question, kept for more": encode_and_fuse,
        "second question": lambda: fuse(prefusion, sizes.frames, pictures=encoded),
        "language model": lambda: model(inputs_embeds=embeds, logits_to_keep=1).logits,
    }


@torch.no_grad()
def measure_seconds(variants: dict[str, Variant], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each variant in each round of turns. One more round comes first and does not count."""
    runs = {name: partial(time_run, variant) for name, variant in variants.items()}
    run_in_turns(runs, 1)
    return {name: [seconds for seconds, _ in turns] for name, turns in run_in_turns(runs, repeats).items()}


def speedup_rows(sizes: BenchmarkSizes, repeats: int) -> list[list[str]]:
    """Return a table row for each variant.

    A row holds seconds, FLOPs, both as shares of the released way, and the largest difference of the language model's
    input, in its standard deviations.
    """
    variants = build_variants(sizes)
    seconds = measure_seconds(variants, repeats)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    flops = {name: count_flops(variant)[0] for name, variant in variants.items()}
    first = next(iter(variants))
    with torch.no_grad():
        expected = variants[first]()
        outputs = {name: variant() for name, variant in variants.items()}
    rows = []
    for name, times in seconds.items():
        row = [name, f"{median[name]:.3f} ({min(times):.3f} to {max(times):.3f})", f"{flops[name] / 1e9:.2f}"]
        row += [f"{median[name] / median[first]:.3f}", f"{flops[name] / flops[first]:.3f}"]
        comparable = outputs[name].shape == expected.shape
        difference = float((outputs[name] - expected).abs().max() / expected.std()) if comparable else None
        rows.append([*row, "" if difference is None else f"{difference:.1e}"])
    second_question, language_model = median["second question"], median["language model"]
    share = (second_question + language_model) / (median[first] + language_model)
    rows.append(["second question, with the language model", "", "", f"{share:.3f}", "", ""])
    return rows


@torch.inference_mode()
def measure_memory(sizes: BenchmarkSizes, pixels: str) -> PeakMemory:
    """Measure the peak memory of this process while it answers one question about the video.

    Args:
        sizes: The sizes of model, video and question.
        pixels: "streamed" or "held"; or "none" for a prompt of as many text tokens, without a video.
    """
    logging.set_verbosity_error()
    model: Any = sizes.model()
    model.config.frames_per_chunk = min(sizes.frames, 8)
    inputs = sizes.inputs()
    before = peak_resident_bytes()
    if pixels == "none":
        embeds = model.model.embed(inputs["input_ids"] % IMAGE_TOKEN)
    else:
        frames: Any = torch.cat(list(sizes.stream())) if pixels == "held" else sizes.stream()
        embeds = model.model.fuse(**inputs, pixel_values=frames)[0]
    fused = peak_resident_bytes()
    answer = model(inputs_embeds=embeds, logits_to_keep=1)
    name = cache_name(answer)
    model(input_ids=answer.logits.argmax(-1), **{name: answer[name]})
    return PeakMemory(fused - before, peak_resident_bytes() - before)


def measure_memories(runs: list[tuple[BenchmarkSizes, str]]) -> list[PeakMemory]:
    """Call `measure_memory` for each run in a process of its own, one after the other."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        return list(pool.map(measure_memory, *zip(*runs, strict=True)))


def pixel_memory_rows(sizes: BenchmarkSizes) -> list[list[str]]:
    """Return a table row for held and for streamed pixels: frames, and MiB up to the language model."""
    ways = ["held", "streamed"]
    peaks = measure_memories([(sizes, way) for way in ways])
    return [[way, str(sizes.frames), f"{peak.fused / 2**20:,.0f}"] for way, peak in zip(ways, peaks, strict=True)]


def long_video_rows(sizes: list[BenchmarkSizes]) -> list[list[str]]:
    """Return a table row for each video.

    A row holds the frames, then MiB: up to the language model; with the answer; with the answer to as many text tokens
    instead of the video; and of all pixels if they were held.
    """
    peaks = measure_memories([(size, pixels) for size in sizes for pixels in ("streamed", "none")])
    rows = []
    for size, video, text in zip(sizes, peaks[::2], peaks[1::2], strict=True):
        sizes_in_bytes = [video.fused, video.answered, text.answered, size.frames * 3 * size.pixels**2 * 4]
        rows.append([f"{size.frames:,}", *(f"{value / 2**20:,.1f}" for value in sizes_in_bytes)])
    return rows


def main() -> None:
    """Measure, and print the tables; exit with a one-line error if an option is invalid."""
    logging.set_verbosity_error()
    try:
        request = parse_arguments(sys.argv[1:], SpeedupRequest, __doc__)
        sizes = BenchmarkSizes.read(request)
        lengths = [parse_count("long", length) for length in request.long.split(",")] if request.long else []
        repeats, held_frames = parse_count("repeats", request.repeats), parse_count("held", request.held)
    except ValueError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    if lengths:
        small = [BenchmarkSizes(128, 4, 2, 64, 20, length) for length in lengths]
        print("A small model with streamed frames. MiB beyond libraries and weights:\n")
        columns = ["frames", "before the language model", "with the answer", "as much text instead", "pixels if held"]
        print(markdown_table(columns, long_video_rows(small), ()))
        return
    print(f"{sizes}, {torch.get_num_threads()} threads. Up to the input of the language model:\n")
    columns = ["variant", "seconds", "GFLOPs", "share of seconds", "share of FLOPs", "difference"]
    print(markdown_table(columns, speedup_rows(sizes, repeats), ()))
    print("\nMiB for the pixels of a longer video and their features:\n")
    longer = BenchmarkSizes(sizes.width, 1, sizes.prefusion, sizes.patches, sizes.text, held_frames)
    print(markdown_table(["pixels", "frames", "MiB"], pixel_memory_rows(longer), ()))


if __name__ == "__main__":
    main()
