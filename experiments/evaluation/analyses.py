"""The analyses of a cell on the test questions, such as attention, removal of visual tokens and knock-out.

The paper's analyses are attention mass and entropy, and removal of visual tokens. The others check them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from transformers import PreTrainedModel

from experiments.config.schema import ProbeConfig
from experiments.data.samples import Sample
from experiments.evaluation.attention_by_layer import measure_attention
from experiments.evaluation.layerwise_ablation import measure_knockout, measure_removal
from experiments.evaluation.onset import measure_onset
from experiments.evaluation.questions import EncodedQuestions
from experiments.evaluation.readouts import measure_lens, measure_readout

log = logging.getLogger(__name__)

_READ_IMAGES = ("attention", "removal", "onset", "knockout", "readout", "lens", "view_questions")


def check_probe_layers(model: PreTrainedModel, config: ProbeConfig) -> None:
    """Check, before anything is measured, that blocks and windows of layers fit the model.

    Raises:
        ValueError: If a block or window has no layers, or more than the model.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for setting in ("removal_block_size", "knockout_width"):
        layers = getattr(config, setting)
        if not 1 <= layers <= depth:
            raise ValueError(f"probe.{setting}: {layers} layers at once in a model of {depth}; use 1 to {depth}")


def check_questions_have_images(samples: Iterable[Sample], config: ProbeConfig) -> None:
    """Check, before anything is computed, that each test question has an image if an analysis reads it.

    Args:
        samples: The test split. No image is loaded.
        config: Which analyses are run.

    Raises:
        ValueError: If an entry is text alone, and an analysis would read its image.
    """
    configured = [name for name in _READ_IMAGES if getattr(config, name)]
    for number, sample in enumerate(samples if configured else (), start=1):
        if not sample.loaders:
            raise ValueError(
                f"probe.{configured[0]}: entry {number} of the test split ({sample.id!r}) has no image to analyse; leave "
                "entries of text alone out of the test data, or analyses out"
            )


def run_probes(
    model: PreTrainedModel,
    questions: EncodedQuestions,
    attention_questions: EncodedQuestions,
    config: ProbeConfig,
) -> dict[str, Any]:
    """Run the configured analyses.

    Args:
        model: The model.
        questions: The questions of all analyses but attention.
        attention_questions: The questions that attention is recorded on. They hold pixels, not cached features, since
            the vision tower of the random-weight control must encode them.
        config: Which analyses to run.

    Returns:
        The parts `attention`, `contribution`, `sinks`, `removal`, `onset`, `knockout`, `readout`, `fusion` and `lens`
        of a record, `readout_note` and `lens_note`. A part that is not configured is None.
    """
    parts: dict[str, dict[str, Any] | None] = dict.fromkeys(("attention", "removal", "knockout", "readout"))
    beside_attention: dict[str, Any] = {"contribution": None, "sinks": None}
    if config.attention:
        beside_attention = measure_attention(model, attention_questions, config)
        parts["attention"] = beside_attention.pop("attention")
    lens: dict[str, Any] | None = None
    notes: dict[str, str | None] = {"readout_note": None, "lens_note": None}
    with questions.features_as_pixel_values():
        if config.removal:
            parts["removal"] = measure_removal(model, questions, config.removal_block_size)
        onset = measure_onset(model, questions, config.removal_block_size) if config.onset else None
        if config.knockout:
            parts["knockout"] = measure_knockout(model, questions, config.knockout_width)
        if config.readout:
            parts["readout"], notes["readout_note"] = _part_or_reason(measure_readout, model, questions)
        if config.lens:
            lens, notes["lens_note"] = _part_or_reason(measure_lens, model, questions)
    fusion_depths = {name: part.pop("fusion") for name, part in parts.items() if part}
    return {**parts, **beside_attention, "onset": onset, "lens": lens, "fusion": fusion_depths or None, **notes}


def _part_or_reason(
    measure: Callable[[PreTrainedModel, EncodedQuestions], dict[str, Any]],
    model: PreTrainedModel,
    questions: EncodedQuestions,
) -> tuple[dict[str, Any] | None, str | None]:
    """Return a part of a record and None, or None and the reason: not every model and test split can be read."""
    try:
        return measure(model, questions), None
    except ValueError as error:
        log.warning("%s: left out, %s", measure.__name__, error)
        return None, str(error)
