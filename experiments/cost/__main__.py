"""Estimate the cost of a model before a run.

    python -m experiments.cost model=llava-1.5-7b tokens=1,4,16,all prefusion=4 frames=1,100,10000
    python -m experiments.cost published

`tokens` are visual tokens per frame: square numbers, or `all` for LLaVA itself. Further options are text=60, tiles=1 and
compressor=query. reduction=fastv,vtw,pyramid_drop adds LLaVA with these methods, with the settings of conf/reduction.
place=inside lets the first layers of the language model do the pre-fusion. `published` compares the FLOPs that the paper
prints with ours.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pandas as pd
from transformers import logging

from experiments.arguments import parse_arguments, parse_count
from experiments.config.schema import PREFUSION_LOCATIONS
from experiments.cost.architectures import llava_config, llava_mini_config
from experiments.cost.estimate import CostEstimate, CostModel, Prompt
from experiments.cost.paper_values import printed_flops_table
from experiments.cost.reduced_prompts import (
    estimate_with_inside_prefusion,
    estimate_with_reduction,
    published_reduction,
)

COLUMNS = (
    "frames",
    "tokens",
    "in the LLM",
    "TFLOPs",
    "with attention",
    "of LLaVA",
    "decode GFLOPs",
    "cache MiB",
    "pixels MiB",
)


@dataclass(frozen=True)
class CostRequest:
    """The options of the command line, as text; commas separate several values."""

    model: str = "llava-1.5-7b"
    tokens: str = "1,4,16,64,all"
    frames: str = "1"
    prefusion: str = "4"
    text: str = "60"
    tiles: str = "1"
    compressor: str = "query"
    reduction: str = ""
    place: str = "outside"


def cost_table(request: CostRequest) -> pd.DataFrame:
    """Return a row with `COLUMNS` for each number of frames and each model.

    Raises:
        ValueError: If an option is invalid, or a number of tokens is no square number.
    """
    llava = llava_config(request.model)
    llava_costs, rows = CostModel(llava), []
    layers, text, tiles = (parse_count(name, getattr(request, name)) for name in ("prefusion", "text", "tiles"))
    if request.place not in PREFUSION_LOCATIONS:
        raise ValueError(f"place: no {request.place!r}; use {' or '.join(PREFUSION_LOCATIONS)}")
    inside = request.place == "inside"
    models: dict[str, Callable[[Prompt], CostEstimate]] = {}
    for tokens in request.tokens.split(","):
        if tokens == "all":
            models[tokens] = llava_costs
            continue
        side = math.isqrt(parse_count("tokens", tokens))
        if side * side != int(tokens):
            raise ValueError(f"tokens: {tokens} is no square number; the nearest are {side**2} and {(side + 1) ** 2}")
        fields = {"compressor": request.compressor, "compressor_size": side, "keep_patches": inside}
        mini_costs = CostModel(llava_mini_config(llava, **fields, prefusion_layers=0 if inside else layers))
        models[tokens] = partial(estimate_with_inside_prefusion, mini_costs, layers=layers) if inside else mini_costs
    for name in request.reduction.split(",") if request.reduction else ():
        models[name] = partial(estimate_with_reduction, llava_costs, reduction=published_reduction(name))
    for frames in request.frames.split(","):
        prompt = Prompt(text, parse_count("frames", frames), tiles)
        llava_flops = llava_costs(prompt).flops("paper")
        rows += [_table_row(tokens, model(prompt), llava_flops) for tokens, model in models.items()]
    return pd.DataFrame(rows, columns=COLUMNS)


def cost_notes(request: CostRequest, rows: pd.DataFrame) -> list[str]:
    """Return the lines below the table; the last one warns if a prompt exceeds the model's context length."""
    limit = llava_config(request.model).get_text_config().max_position_embeddings
    lines = [
        f"{request.model}, {request.text} text tokens, {request.prefusion} pre-fusion layers {request.place} the "
        f"language model, compressor {request.compressor}. TFLOPs of a prompt: of linear maps only, as the paper counts; "
        "with attention, as torch counts.",
        "Cache: keys and values of the prompt in 16 bits. Pixels: those of all frames in 16 bits, held at once.",
    ]
    longest = max(int(count.replace(",", "")) for count in rows["in the LLM"]) + int(request.text)
    if longest > limit:
        lines.append(f"The longest prompt has {longest:,} tokens, {longest - limit:,} more than the model's {limit:,}.")
    return lines


def main() -> None:
    """Print the table; exit with a one-line error if an option is invalid."""
    logging.set_verbosity_error()
    if sys.argv[1:] == ["published"]:
        print(printed_flops_table().round(5).to_string(index=False))
        return
    try:
        request = parse_arguments(sys.argv[1:], CostRequest, __doc__)
        rows = cost_table(request)
    except ValueError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(rows.to_string(index=False))
    print("\n".join(cost_notes(request, rows)))


def _table_row(tokens: str, estimate: CostEstimate, llava_flops: float) -> list[str]:
    paper, full = (estimate.flops(convention) for convention in ("paper", "full"))
    mebibytes = [estimate.cache_bytes() / 2**20, estimate.pixel_bytes() / 2**20]
    numbers = [f"{paper / 1e12:,.3g}", f"{full / 1e12:,.3g}", f"{paper / llava_flops:.1%}"]
    numbers += [f"{estimate.decode.flops('full') / 1e9:,.3g}", *(f"{size:,.1f}" for size in mebibytes)]
    return [f"{estimate.prompt.frames:,}", tokens, f"{estimate.visual_tokens:,}", *numbers]


if __name__ == "__main__":
    main()
