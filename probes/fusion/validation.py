"""Check of fusion depth, onset and reading layers on planted models: `python -m probes.fusion.validation` prints a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from probes.fusion.curves import attention_curve, knockout_curve, removal_curve, text_states
from probes.fusion.depth import FusionDepth, fusion_depth
from probes.fusion.onset import FusionOnset, fusion_onset, onset_curve
from probes.fusion.planted_models import PlantedModel, planted
from probes.fusion.reading_layer import ReadingLayer, reading_layer
from probes.interventions.swapping import swap_images
from probes.readouts.linear_probe import linear_readout
from probes.tokens.token_map import TokenMap

LAYER_COUNTS = range(4, 13)


def estimate_depths(model: PlantedModel, count: int = 32, seed: int = 0, width: int = 1) -> tuple[FusionDepth, ...]:
    """Estimate the fusion depth from attention, removal, knock-out and read-out of the colour.

    The estimates run the same probes as for any other model.

    Args:
        model: A planted model.
        count: Samples, measured in one batch.
        seed: Seed of the samples and of the bootstrap.
        width: Layers in a knock-out window.

    Returns:
        The depths from attention, removal, knock-out and read-out.

    Example:
        >>> [estimate.depth for estimate in estimate_depths(planted(layer=2, layers=4))]
        [2, 2, 2, 2]
    """
    samples = model.samples(count, seed)
    arguments = model.model, TokenMap.from_inputs(model.model, samples.inputs), samples.inputs
    readout = linear_readout(text_states(*arguments), samples.colours, seed=seed)
    return (
        fusion_depth(attention_curve(*arguments), "attention", seed=seed),
        fusion_depth(removal_curve(*arguments, samples.score), "removal", seed=seed),
        fusion_depth(knockout_curve(*arguments, samples.score, width), "knockout", width=width, seed=seed),
        fusion_depth(readout.correct, "readout", seed=seed),
    )


def estimate_onset(model: PlantedModel, count: int = 32, seed: int = 0) -> FusionOnset:
    """Estimate the fusion onset with the probes that run on any other model.

    Args:
        model: A planted model.
        count: Samples, measured in one batch.
        seed: Seed of the samples and of the bootstrap.

    Returns:
        The onset.

    Example:
        >>> estimate_onset(planted(layer=(2, 4), layers=4)).onset
        2
    """
    samples = model.samples(count, seed)
    arguments = model.model, TokenMap.from_inputs(model.model, samples.inputs), samples.inputs
    return fusion_onset(onset_curve(*arguments, samples.score), seed=seed)


def estimate_reading_layers(model: PlantedModel, count: int = 32, seed: int = 0) -> tuple[ReadingLayer, ReadingLayer]:
    """Estimate the layers that read red and blue, by swaps of minimal pairs.

    Args:
        model: A planted model.
        count: Pairs of each colour, measured in one batch.
        seed: Seed of the pairs and of the bootstrap.

    Returns:
        The reading layers of red and of blue.

    Example:
        >>> [estimate.layer for estimate in estimate_reading_layers(planted(layer=(2, 4), layers=4))]
        [2, 4]
    """
    red, blue = (model.pairs(count, "red", seed), model.pairs(count, "blue", seed))
    return reading_layer(swap_images(*red.arguments), seed=seed), reading_layer(swap_images(*blue.arguments), seed=seed)


def planted_cases(layer_counts: Iterable[int] = LAYER_COUNTS) -> Iterator[tuple[int, int | tuple[int, int] | None]]:
    """Yield the number of layers and the planted layer of each model to check.

    For each number of layers: every single layer, the first and the last layer together, and the text-only control.
    """
    for layers in layer_counts:
        yield from ((layers, layer) for layer in range(1, layers + 1))
        yield layers, (1, layers)
        yield layers, None


def validation_table() -> Iterator[str]:
    """Yield the lines of a Markdown table with the estimates for all `planted_cases`."""
    yield "| Layers | Read at | Attention | Removal | Knock-out | Read-out | Onset | Red by swaps | Blue by swaps |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for layers, layer in planted_cases():
        model = planted(layer, layers)
        estimates = [_format_estimate(depth.depth, depth) for depth in estimate_depths(model)]
        onset = estimate_onset(model)
        swaps = [_format_estimate(reading.layer, reading) for reading in estimate_reading_layers(model)]
        columns = [str(layers), _join_layers(model.reads), *estimates, _format_estimate(onset.onset, onset), *swaps]
        yield f"| {' | '.join(columns)} |"


def _join_layers(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def _format_estimate(layer: int | None, estimate: FusionDepth | FusionOnset | ReadingLayer) -> str:
    """Return one table entry, such as "3, read at 3" or "none"."""
    if layer is None:
        return "none"
    interval = "" if estimate.low == estimate.high else f" ({estimate.low} to {estimate.high})"
    return f"{layer}{interval}, read at {_join_layers(estimate.reads)}"


if __name__ == "__main__":
    for line in validation_table():
        print(line, flush=True)
