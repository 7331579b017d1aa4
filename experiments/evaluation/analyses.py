"""The paper's three analyses on test questions (attention mass, attention entropy, removal of visual tokens), and two
that check them: attention knock-out, and what a linear read-out finds in the text."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from experiments.config.schema import ProbeConfig
from experiments.evaluation.attention_by_layer import attention
from experiments.evaluation.layerwise_ablation import knockout, removal
from experiments.evaluation.questions import Questions
from experiments.evaluation.readouts import lens, readout


def check(model: PreTrainedModel, config: ProbeConfig) -> None:
    """Before anything is measured: can it be?

    Raises:
        ValueError: if the layers to take visual tokens from at once are more than the model has, or none.
    """
    layers = model.config.get_text_config().num_hidden_layers
    for field, count in (("block", config.block), ("knockout_width", config.knockout_width)):
        if not 1 <= count <= layers:
            raise ValueError(f"probe.{field}: {count} layers at once in a model of {layers}; use 1 to {layers}")


def analyse(model: PreTrainedModel, questions: Questions, some: Questions, config: ProbeConfig) -> dict[str, Any]:
    """All that `config` asks for; attention is recorded on `some` questions, with pixels for the tower of random weights
    to look at; the rest is measured on all."""
    found: dict[str, dict[str, Any] | None] = dict.fromkeys(("attention", "removal", "knockout", "readout"))
    if config.attention:
        found["attention"] = attention(model, some, config.random_control)
    with questions.given():
        if config.removal:
            found["removal"] = removal(model, questions, config.block)
        if config.knockout:
            found["knockout"] = knockout(model, questions, config.knockout_width)
        if config.readout:
            found["readout"] = readout(model, questions)
        read = _lens(model, questions, config)
    depths = {name: part.pop("fusion") for name, part in found.items() if part}
    return {**found, "fusion": depths or None, **read}


def _lens(model: PreTrainedModel, questions: Questions, config: ProbeConfig) -> dict[str, Any]:
    """The `lens` part, and in `lens_note` why it is None where it was asked for: not every model can be read so."""
    try:
        return {"lens": lens(model, questions) if config.lens else None, "lens_note": None}
    except ValueError as error:
        return {"lens": None, "lens_note": str(error)}
