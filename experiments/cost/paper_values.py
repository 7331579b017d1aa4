"""The FLOPs that LLaVA-Mini prints (arXiv 2501.03895), each beside what its own way of counting gives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pandas as pd
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from experiments.cost.architectures import VICUNA_7B, mini
from experiments.cost.estimate import Convention, Geometry, Prompt, Work
from llava_mini.convert import CLIP_L_336

# The paper does not say how much text it counts. No one length fits all figures to their last digit, but these two do:
# one all of LLaVA's, the other all of LLaVA-Mini's that have no note.
TEXT_OF_LLAVA, TEXT_OF_MINI = 42.82, 43.118
# Two of the figures contradict each other by less than this share of their rounding.
SLACK = 0.01
# Vicuna's own vocabulary: the paper counts its output map on every token.
VOCABULARY = 32000


@dataclass(frozen=True)
class Printed:
    """One printed figure, in teraFLOPs.

    Args:
        source: Where it stands in the paper.
        value: As printed; half of its last digit is the rounding.
        digits: After the point.
        size: C; 0 stands for LLaVA itself, all patches.
        layers: Of pre-fusion.
        tiles: 2 for 672 pixels.
        part: A component of `Estimate`, "language model" (with its head), or "total".
        compressor: "query" or "average".
        within: Pre-fusion is the language model's own first layers, compression comes after them (Table 12).
        convention: Table 8 alone counts attention too.
        note: What is wrong with it, where something is.
    """

    source: str
    value: float
    digits: int = 2
    size: int = 1
    layers: int = 4
    tiles: int = 1
    part: str = "total"
    compressor: str = "query"
    within: bool = False
    convention: Convention = "paper"
    note: str = ""


LLAVA: dict[str, Any] = {"size": 0, "layers": 0}
NO_FUSION: dict[str, Any] = {"layers": 0}
OF_TOTAL = "does not fit the printed total, which is right"
FIVE = "five times the rounded figure of one crop"
PRINTED = (
    Printed("Fig. 7, LLaVA-v1.5", 8.55, **LLAVA),
    Printed("Fig. 7, 1 token", 1.96),
    Printed("Fig. 7, 4 tokens", 2.01, size=2),
    Printed("Fig. 7, 16 tokens", 2.19, size=4),
    Printed("Fig. 7, 64 tokens", 2.90, size=8),
    Printed("Table 6, no pre-fusion, 1 token", 0.96, **NO_FUSION),
    Printed("Table 6, no pre-fusion, 16 tokens", 1.16, size=4, **NO_FUSION),
    Printed("Table 6, no pre-fusion, 64 tokens", 1.79, size=8, **NO_FUSION),
    Printed("Table 6, no pre-fusion, 144 tokens", 2.85, size=12, **NO_FUSION),
    Printed("Table 6, 1 layer", 1.21, layers=1),
    Printed("Table 6, 2 layers", 1.46, layers=2),
    Printed("Table 6, 3 layers", 1.81, layers=3, note="a slip of the pen for 1.71: no row beside it allows it"),
    Printed("Table 6, 4 layers", 1.96),
    Printed("Table 8, average pooling, 1 token", 1.96, compressor="average"),
    Printed("Table 8, average pooling, 4 tokens", 2.01, size=2, compressor="average"),
    Printed("Table 8, the query compressor, 1 token", 0.00242, 5, part="compressor", convention="full"),
    Printed("Table 8, the query compressor, 4 tokens", 0.00244, 5, size=2, part="compressor", convention="full"),
    Printed("Table 12, pre-fusion within the language model", 1.84, within=True, note="not found"),
    Printed("Table 14, 336 px, LLaVA, vision encoder", 0.349, 3, part="tower", **LLAVA),
    Printed("Table 14, 336 px, LLaVA, projection", 0.024, 3, part="projector", **LLAVA),
    Printed("Table 14, 336 px, LLaVA, LLM", 8.177, 3, part="language model", **LLAVA),
    Printed("Table 14, 336 px, LLaVA, total", 8.55, **LLAVA),
    Printed("Table 14, 336 px, Mini, vision encoder", 0.349, 3, part="tower"),
    Printed("Table 14, 336 px, Mini, projection", 0.024, 3, part="projector"),
    Printed("Table 14, 336 px, Mini, compression", 0.001, 3, part="compressor", note="Table 8 has 2.42 G for the same"),
    Printed("Table 14, 336 px, Mini, pre-fusion", 0.125, 3, part="prefusion", note=OF_TOTAL),
    Printed("Table 14, 336 px, Mini, LLM", 1.460, 3, part="language model", note=OF_TOTAL),
    Printed("Table 14, 336 px, Mini, total", 1.96),
    Printed("Table 14, 672 px, LLaVA, vision encoder", 1.745, 3, tiles=2, part="tower", note=FIVE, **LLAVA),
    Printed("Table 14, 672 px, LLaVA, projection", 0.121, 3, tiles=2, part="projector", **LLAVA),
    Printed("Table 14, 672 px, LLaVA, LLM", 38.623, 3, tiles=2, part="language model", **LLAVA),
    Printed("Table 14, 672 px, LLaVA, total", 40.49, tiles=2, **LLAVA),
    Printed("Table 14, 672 px, Mini, vision encoder", 1.745, 3, tiles=2, part="tower", note=FIVE),
    Printed("Table 14, 672 px, Mini, projection", 0.121, 3, tiles=2, part="projector"),
    Printed("Table 14, 672 px, Mini, compression", 0.009, 3, tiles=2, part="compressor", note="cut, not rounded"),
    Printed("Table 14, 672 px, Mini, pre-fusion", 1.183, 3, tiles=2, part="prefusion", note=OF_TOTAL),
    Printed("Table 14, 672 px, Mini, LLM", 4.131, 3, tiles=2, part="language model", note=OF_TOTAL),
    Printed("Table 14, 672 px, Mini, total", 7.19, tiles=2, note="of one token, where the model at 672 px has 64"),
    Printed("Section 5, 672 px, Mini with 64 tokens", 8.13, size=8, tiles=2),
)

# What the figures below are of, by its name in experiments/cost/architectures.py.
GEOMETRY = "llava-1.5-7b"
# Milliseconds to the first token of one picture of 336 pixels, by device and by C, 0 for LLaVA (Table 13; Fig. 7 draws
# those of the A100).
FIRST_TOKEN: dict[str, dict[int, float]] = {
    "RTX 3090": {0: 198.75, 1: 64.52, 2: 65.52, 4: 68.97, 8: 80.10},
    "A100 40G": {0: 113.04, 1: 38.64, 2: 38.84, 4: 39.28, 8: 46.23},
    "A800": {0: 87.43, 1: 27.43, 2: 27.71, 4: 28.92, 8: 34.65},
}
# LLaVA's time over LLaVA-Mini's at 672 pixels (section 5, of Fig. 8).
SPEED_UP_672 = 3.76
# Fig. 9: GB at most over so many frames, of LLaVA-Mini with one token; and MB that each frame adds, by C.
MEMORY = {1: 15.2, 10_000: 21.5}
MEMORY_OF_A_FRAME = {0: 358, 1: 0.6}
# TeraFLOPs by tiles a side and by C, of Figs. 7 and 8.
TOTALS: dict[int, dict[int, float]] = {
    tiles: {
        p.size: p.value
        for p in PRINTED
        if p.tiles == tiles and p.source.startswith(("Fig. 7", "Table 14", "Section 5")) and p.part == "total"
    }
    for tiles in (1, 2)
}


@cache
def _geometry(size: int, layers: int, compressor: str) -> Geometry:
    llava = LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP_L_336), text_config=LlamaConfig(**VICUNA_7B | {"vocab_size": VOCABULARY})
    )
    if not size:
        return Geometry(llava)
    return Geometry(mini(llava, compressor=compressor, compressor_size=size, prefusion_layers=layers))


def ours(printed: Printed, text: float | None = None) -> float:
    """The same figure as this project counts it, in teraFLOPs, under the paper's convention; with `text` tokens of text
    in place of TEXT_OF_LLAVA or TEXT_OF_MINI."""
    text = text or (TEXT_OF_MINI if printed.size else TEXT_OF_LLAVA)
    geometry = _geometry(printed.size, printed.layers, printed.compressor)
    estimate = geometry(Prompt(text, tiles=printed.tiles))
    if printed.within:
        llava = _geometry(0, 0, "query")
        one = [1.0] * printed.layers + [1 / llava.patches] * (llava.layers - printed.layers)
        work = estimate.compressor + sum(llava(Prompt(text, visual_by_layer=one)).components.values(), Work())
    elif printed.part == "total":
        work = sum(estimate.components.values(), Work())
        if printed.size and not printed.layers:
            # the released code projects the patches even where nothing reads them
            work += geometry.projector * geometry.patches
    elif printed.part == "language model":
        work = estimate.prefill + estimate.head
    else:
        work = estimate.components[printed.part]
    return work.flops(printed.convention) / 1e12


def table() -> pd.DataFrame:
    """One row a figure: source, printed, ours, error (ours - printed), rounding (half of the last digit), fits, note."""
    rows = []
    for printed in PRINTED:
        value, rounding = ours(printed), 0.5 * 10**-printed.digits
        error = value - printed.value
        rows.append(
            (printed.source, printed.value, value, error, rounding, abs(error) <= rounding * (1 + SLACK), printed.note)
        )
    return pd.DataFrame(rows, columns=["source", "printed", "ours", "error", "rounding", "fits", "note"])
