"""Measure CPU time as a share of the released code's, on one thread and the same weights.

    python -m experiments.benchmarks.released_ratio --frames 16 --rounds 5

The released code is not at hand. `released_logits` computes everything that it computes (ictnlp/LLaVA-Mini, commit
47da113): frame by frame, all layers of the vision tower, all tokens in every pre-fusion layer, logits of all positions.
The model has a language model of 8 layers of width 512, 4 pre-fusion layers, and a CLIP of 6 layers of width 1024 on 256
patches; the question has 60 tokens. Weights are random. All runs take turns; each time is the minimum of the rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, logging
from transformers.activations import QuickGELUActivation
from transformers.masking_utils import create_causal_mask

from experiments.benchmarks.harness import cpu_seconds, run_in_turns
from experiments.markdown import markdown_table
from llava_mini import LlavaMiniConfig, LlavaMiniForConditionalGeneration
from llava_mini.quick_gelu import QuickGELU, replace_quick_gelu

PATCH_PIXELS, IMAGE_TOKEN = 14, 999


def build_model(width: int = 512, vision_width: int = 1024, side: int = 16) -> LlavaMiniForConditionalGeneration:
    """Return the model with random weights.

    Args:
        width: Width of the language model, a multiple of 64.
        vision_width: Width of the vision tower, a multiple of 64.
        side: Patches along a side of an image.
    """
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=4 * vision_width,
        num_hidden_layers=6,
        num_attention_heads=vision_width // 64,
        image_size=PATCH_PIXELS * side,
        patch_size=PATCH_PIXELS,
    )
    text = LlamaConfig(
        vocab_size=IMAGE_TOKEN + 1,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=8,
        num_attention_heads=width // 64,
    )
    config = LlavaMiniConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, prefusion_layers=4)
    return LlavaMiniForConditionalGeneration(config).eval()


def make_inputs(model: LlavaMiniForConditionalGeneration, frames: int, text: int = 60) -> dict[str, Tensor]:
    """Return random pixels of a video, and a question of this many tokens with one placeholder for each frame."""
    generator = torch.Generator().manual_seed(0)
    vision: Any = model.config.vision_config
    words = torch.randint(3, IMAGE_TOKEN, (text,), generator=generator)
    return {
        "input_ids": torch.cat([words[:1], torch.full((frames,), IMAGE_TOKEN), words[1:]])[None],
        "pixel_values": torch.randn(frames, 3, vision.image_size, vision.image_size, generator=generator),
        "visual_layout": torch.tensor([[0, frames, 1]]),
    }


@torch.no_grad()
def released_logits(
    model: LlavaMiniForConditionalGeneration, input_ids: Tensor, pixel_values: Tensor, visual_layout: Tensor
) -> Tensor:
    """Compute the logits of all positions of one row as the released code does, (1, length, vocabulary)."""
    inner: Any = model.model
    is_visual = input_ids[0] == IMAGE_TOKEN
    embeds = inner.get_input_embeddings()(input_ids.masked_fill(is_visual, 0))
    text = embeds[:, ~is_visual]
    fused, tokens = torch.zeros_like(text), []
    for frame in pixel_values:
        features = _released_features(inner.vision_tower, frame)
        compressed = _released_compression(inner.compressor, features)
        visual = [inner.multi_modal_projector(part) for part in (features, compressed)]
        states = torch.cat([*visual, text], dim=1)
        position_ids = torch.arange(states.shape[1])[None]
        mask = create_causal_mask(inner.language_model.config, states, None, None)
        rotation = inner.language_model.rotary_emb(states, position_ids=position_ids)
        for layer in inner.prefusion.layers:
            states = layer(states, attention_mask=mask, position_ids=position_ids, position_embeddings=rotation)
        tokens.append(states[:, features.shape[1] : features.shape[1] + compressed.shape[1]])
        fused += states[:, features.shape[1] + compressed.shape[1] :]
    embeds[:, ~is_visual] = fused / len(pixel_values)
    embeds[:, is_visual] = torch.cat(tokens, dim=1)
    return model.lm_head(inner.language_model(inputs_embeds=embeds).last_hidden_state)


def _released_features(vision_tower: nn.Module, frame: Tensor) -> Tensor:
    """Run the whole vision tower on one frame, with transformers' activation function."""
    replace_quick_gelu(vision_tower, QuickGELU, QuickGELUActivation)
    try:
        return vision_tower(frame[None], output_hidden_states=True).hidden_states[-2][:, 1:]
    finally:
        replace_quick_gelu(vision_tower)


def _released_compression(compressor: Any, features: Tensor) -> Tensor:
    """Run the released `Resampler`: torch's attention, and a position table resized for every image."""
    attention, side, width = compressor.attn, int(features.shape[1] ** 0.5), features.shape[2]
    table = compressor.pos_embed.T.unflatten(1, (compressor.size, compressor.size))[None]
    positions = nn.functional.interpolate(table, size=(side, side), mode="bicubic", align_corners=False)
    patches = compressor.ln_kv(features)
    query = (compressor.ln_q(compressor.query) + compressor.pos_embed)[None]
    maps = (attention.in_proj_weight, attention.in_proj_bias, None, None, False, 0.0)
    output, _ = nn.functional.multi_head_attention_forward(
        *(x.transpose(0, 1) for x in (query, patches + positions[0].flatten(1).T, patches)),
        *(width, attention.heads, *maps, attention.out_proj.weight, attention.out_proj.bias),
    )
    return output.transpose(0, 1)


@torch.no_grad()
def ratio_rows(model: LlavaMiniForConditionalGeneration, frames: Sequence[int], rounds: int) -> list[list[str]]:
    """Return table rows of the first and of a second question about videos of these lengths; 1 is an image.

    A row holds CPU seconds of the released computation and of this project, their ratio, and the largest difference of a
    logit.
    """
    rows = []
    for count in frames:
        inputs = make_inputs(model, count)
        pictures = model.encode_pictures(inputs["pixel_values"], inputs["visual_layout"])
        runs: dict[str, Callable[[], Tensor]] = {
            "released": partial(released_logits, model, **inputs),
            "question": partial(_logits, model, **inputs),
            "second question": partial(_logits, model, input_ids=inputs["input_ids"], pictures=pictures),
        }
        logits = {name: run() for name, run in runs.items()}  # warm up
        times = run_in_turns({name: partial(cpu_seconds, run) for name, run in runs.items()}, rounds)
        released = min(times["released"])
        for name in ("question", "second question"):
            difference = float((logits[name] - logits["released"]).abs().max())
            seconds = min(times[name])
            figures = [f"{released:.3f}", f"{seconds:.3f}", f"{seconds / released:.3f}", f"{difference:.1e}"]
            rows.append([f"{count} frame{'s' * (count > 1)}, {name}", *figures])
    return rows


def _logits(model: LlavaMiniForConditionalGeneration, **inputs: Any) -> Tensor:
    return model(**inputs).logits


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and return the exit status 0."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.released_ratio", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 16], help="frames of each video (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (%(default)s)")
    arguments = parser.parse_args(argv)
    for name in ("frames", "rounds"):
        if min([getattr(arguments, name)] if name == "rounds" else arguments.frames) < 1:
            parser.error(f"--{name}: must be at least 1, found {getattr(arguments, name)}")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    columns = ["input", "released, s", "this project, s", "ratio", "difference"]
    print(markdown_table(columns, ratio_rows(build_model(), arguments.frames, arguments.rounds), columns[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
