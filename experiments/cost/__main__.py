"""Estimate a model's cost before anyone pays for a run.

    python -m experiments.cost model=llava-1.5-7b tokens=1,4,16,all prefusion=4 frames=1,100,10000
    python -m experiments.cost published

`tokens` are visual tokens a frame: squares, or `all` for LLaVA itself. Further: text=60, tiles=1, compressor=query;
reduction=fastv,vtw,pyramid_drop adds LLaVA under these, as conf/reduction has them; place=inside makes pre-fusion's
layers the language model's own first ones.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pandas as pd
from transformers import logging

from experiments.arguments import request, whole
from experiments.config.schema import PREFUSION_PLACES
from experiments.cost.architectures import geometry, mini
from experiments.cost.estimate import Estimate, Geometry, Prompt
from experiments.cost.paper_values import table
from experiments.cost.reduced_prompts import fused_inside, published, reduced

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
class Request:
    model: str = "llava-1.5-7b"
    tokens: str = "1,4,16,64,all"
    frames: str = "1"
    prefusion: str = "4"
    text: str = "60"
    tiles: str = "1"
    compressor: str = "query"
    reduction: str = ""
    place: str = "outside"


def estimates(asked: Request) -> pd.DataFrame:
    """One row for each number of frames and tokens, with COLUMNS.

    Raises:
        ValueError: If an option is not understood, or a number of tokens is no square.
    """
    llava = geometry(asked.model)
    plain, rows = Geometry(llava), []
    layers, text, tiles = (whole(name, getattr(asked, name)) for name in ("prefusion", "text", "tiles"))
    if asked.place not in PREFUSION_PLACES:
        raise ValueError(f"place: no {asked.place!r}; use {' or '.join(PREFUSION_PLACES)}")
    inside = asked.place == "inside"
    models: dict[str, Callable[[Prompt], Estimate]] = {}
    for tokens in asked.tokens.split(","):
        if tokens == "all":
            models[tokens] = plain
            continue
        side = math.isqrt(whole("tokens", tokens))
        if side * side != int(tokens):
            raise ValueError(f"tokens: {tokens} is no square; near it are {side**2} and {(side + 1) ** 2}")
        fields = {"compressor": asked.compressor, "compressor_size": side, "keep_patches": inside}
        each = Geometry(mini(llava, **fields, prefusion_layers=0 if inside else layers))
        models[tokens] = partial(fused_inside, each, layers=layers) if inside else each
    for name in asked.reduction.split(",") if asked.reduction else ():
        models[name] = partial(reduced, plain, reduction=published(name))
    for frames in asked.frames.split(","):
        prompt = Prompt(text, whole("frames", frames), tiles)
        whole_cost = plain(prompt).flops("paper")
        rows += [_row(tokens, model(prompt), whole_cost) for tokens, model in models.items()]
    return pd.DataFrame(rows, columns=COLUMNS)


def _row(tokens: str, estimate: Estimate, of_llava: float) -> list[str]:
    paper, full = (estimate.flops(convention) for convention in ("paper", "full"))
    mebibytes = [estimate.cache_bytes() / 2**20, estimate.pixel_bytes() / 2**20]
    numbers = [f"{paper / 1e12:,.3g}", f"{full / 1e12:,.3g}", f"{paper / of_llava:.1%}"]
    numbers += [f"{estimate.decode.flops('full') / 1e9:,.3g}", *(f"{size:,.1f}" for size in mebibytes)]
    return [f"{estimate.prompt.frames:,}", tokens, f"{estimate.visual_tokens:,}", *numbers]


def notes(asked: Request, rows: pd.DataFrame) -> list[str]:
    limit = geometry(asked.model).get_text_config().max_position_embeddings
    lines = [
        f"{asked.model}, {asked.text} text tokens, {asked.prefusion} pre-fusion layers {asked.place} the language model, compressor {asked.compressor}. "
        "TFLOPs of a prompt: linear maps alone (as the paper counts), and with attention (as torch counts).",
        "Cache: keys and values of the prompt in 16 bits. Pixels: of all frames in 16 bits, if they are held at once.",
    ]
    longest = max(int(count.replace(",", "")) for count in rows["in the LLM"]) + int(asked.text)
    if longest > limit:
        lines.append(f"The longest prompt has {longest:,} tokens, {longest - limit:,} more than the model's {limit:,}.")
    return lines


def main() -> None:
    logging.set_verbosity_error()
    if sys.argv[1:] == ["published"]:
        print(table().round(5).to_string(index=False))
        return
    try:
        asked = request(sys.argv[1:], Request)
        rows = estimates(asked)
    except ValueError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(rows.to_string(index=False))
    print("\n".join(notes(asked, rows)))


if __name__ == "__main__":
    main()
