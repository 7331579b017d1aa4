"""Whether the estimators of the fusion depth find what was planted: `python -m probes.fusion.validation` prints the table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from probes.fusion.curves import attention_curve, knockout_curve, removal_curve, text_states
from probes.fusion.depth import FusionDepth, fusion_depth
from probes.fusion.planted_models import Planted, planted
from probes.readouts.linear_probe import linear_readout
from probes.tokens.token_map import TokenMap

LAYERS = range(4, 13)


def estimates(model: Planted, count: int = 32, seed: int = 0, width: int = 1) -> tuple[FusionDepth, ...]:
    """Fusion depth from attention, removal, knock-out in windows of `width` layers, and read-out of the colour.

    On `count` samples in one batch, through the probes that any model goes through.
    """
    samples = model.samples(count, seed)
    called = model.model, TokenMap.from_inputs(model.model, samples.inputs), samples.inputs
    return (
        fusion_depth(attention_curve(*called), "attention", seed=seed),
        fusion_depth(removal_curve(*called, samples.score), "removal", seed=seed),
        fusion_depth(knockout_curve(*called, samples.score, width), "knockout", width=width, seed=seed),
        fusion_depth(linear_readout(text_states(*called), samples.colours, seed=seed).correct, "readout", seed=seed),
    )


def grid(layers: Iterable[int] = LAYERS) -> Iterator[tuple[int, int | tuple[int, int] | None]]:
    """Layers and what is planted: every single layer, the first and the last together, and the text-only control."""
    for count in layers:
        yield from ((count, layer) for layer in range(1, count + 1))
        yield count, (1, count)
        yield count, None


def table() -> Iterator[str]:
    """The lines of a Markdown table of all that `grid` plants."""
    yield "| Layers | Read at | Attention | Removal | Knock-out | Read-out |"
    yield "|---|---|---|---|---|---|"
    for layers, layer in grid():
        model = planted(layer, layers)
        cells = [str(layers), _listed(model.reads), *map(_found, estimates(model))]
        yield f"| {' | '.join(cells)} |"


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def _found(depth: FusionDepth) -> str:
    if depth.depth is None:
        return "none"
    interval = "" if depth.low == depth.high else f" ({depth.low} to {depth.high})"
    return f"{depth.depth}{interval}, read at {_listed(depth.reads)}"


if __name__ == "__main__":
    for line in table():
        print(line, flush=True)
