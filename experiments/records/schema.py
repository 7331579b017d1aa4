"""What a record holds, as typed models: `python -m experiments.records.schema` prints its JSON Schema.

Outcomes are strings with one character a question, "1" for a right answer.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from experiments.records.benchmarks import BenchmarkProbes, BenchmarksPart
from experiments.records.consistency import (
    check_attention,
    check_contribution,
    check_depths,
    check_knockout,
    check_length,
    check_onset,
    check_patch_words,
    check_removal,
    check_sinks,
    check_swaps,
)
from experiments.records.generated import GeneratedPart, check_generated
from experiments.records.layer_parts import (
    AttentionPart,
    ContributionPart,
    Depth,
    KnockoutPart,
    Number,
    OnsetPart,
    Outcomes,
    RemovalPart,
    SinksPart,
)
from experiments.records.part import Part
from experiments.records.patch_words import PatchWordsPart

SCHEMA = 1
"""The version of the format."""


class ModelPart(Part):
    """The model that was measured."""

    label: str = Field(description="LLaVA, LLaVA-Mini, or the class of another model")
    layers: int = Field(description="layers of the language model")
    visual_tokens: int = Field(description="visual tokens that enter the language model")
    visual_tokens_mean: float | None = Field(None, description="the mean over its layers, where some are dropped")
    patches: int | None = Field(None, description="patches of one image")
    prefusion_layers: int = Field(description="pre-fusion layers")
    prefusion_place: str | None = Field(None, description="outside or inside the language model")
    compressor: str = Field(description="compressor, and reduction if there is one; none for neither")
    parameters: Number = Field(description="number of parameters")
    files: dict[str, str] | None = Field(
        None, description="hash of the files behind each setting that names weights; null for models of the hub alone"
    )


class DataPart(Part):
    """The test questions."""

    name: str = Field(description="name of the data set")
    split: str | None = Field(None, description="name of the split")
    fingerprint: str = Field(description="hash of the data")
    examples: int = Field(description="number of questions")
    kinds: list[str] | None = Field(None, description="type of each question; null for benchmarks")
    guess: Outcomes | None = Field(None, description="outcomes of a guess from the question's text alone")
    guess_note: str | None = Field(None, description="how the guess is made")
    skipped: dict[str, int] | None = Field(
        None, description="entries of the user's files that could not be used, by split; with data.bad=skip"
    )
    skipped_file: str | None = Field(None, description="the list of them, inside the results folder")


class AccuracyPart(Part):
    """Outcomes by input."""

    image: Outcomes = Field(description="outcomes with the question's image")
    blank: Outcomes | None = Field(None, description="outcomes with a grey image")
    shuffled: Outcomes | None = Field(None, description="outcomes with another question's image")


class CostPart(Part):
    """The cost of one prompt."""

    flops: Number = Field(description="floating-point operations of the prefill")
    cache_bytes: Number = Field(0, description="bytes of keys and values that it leaves in the cache")
    convention: str | None = Field(None, description="what is counted")


class ReadoutDepth(Part):
    """A linear probe's outcomes after some layers."""

    correct: Outcomes
    control: Outcomes = Field(description="outcomes with shuffled answers")


class ReadoutPart(Part):
    """A linear probe on the question's hidden states."""

    samples: int
    depths: list[ReadoutDepth] = Field(description="after 0, 1, ... all layers")


class PhotoReadoutOfGrid(Part):
    """A linear probe on the vision features of grids of one size."""

    grid_size: int = Field(description="photographs per side")
    photographs: int = Field(description="of all images")
    correct: Outcomes = Field(description="whether each photograph's class was named right, image by image")
    control: Outcomes = Field(description="the same for shuffled classes")


class PhotoReadoutPart(Part):
    """A linear probe on the mean of each photograph's patches, in the features that the projector reads."""

    grids: list[PhotoReadoutOfGrid]


class LensDepth(Part):
    """A logit lens after some layers."""

    correct: Outcomes = Field(description="whether the answer's first token ranks first")
    logprob: Number = Field(description="mean log-probability of that token, nats")


class LensPart(Part):
    """A logit lens at the position that predicts the answer."""

    samples: int
    depths: list[LensDepth] = Field(description="after 0, 1, ... all layers")


class SwapsOfProperty(Part):
    """The layer at which text reads one property; the curves are empty where there is none."""

    layer: int | None = Field(description="smallest number of layers after which less than half of the move is left")
    low: int | None = Field(description="lower end of its 95% bootstrap interval")
    high: int | None = Field(description="upper end")
    pairs: int = Field(description="minimal pairs that were measured")
    right: int = Field(description="pairs of which the model answers both images right; the others are left out")
    chance: Number = Field(description="share of assignments of answers to the property that are as good", ge=0, le=1)
    moved: list[Number] = Field(description="share of the answer's move, other image from layer 0, 1, ... on")
    moved_low: list[Number] = Field(description="lower end of its 95% bootstrap interval")
    moved_high: list[Number] = Field(description="upper end")
    flipped: list[Number] = Field(description="share of runs that give the answer to the other image")


class SwapsPart(Part):
    """Answers to minimal pairs whose images are swapped from a layer on."""

    properties: dict[str, SwapsOfProperty] = Field(description="by the property that differs")


class ValidationPoint(Part):
    """A measurement of the validation split during training."""

    step: int = Field(description="optimizer steps taken")
    accuracy: Number = Field(description="share of right answers, from 0 to 1", ge=0, le=1)
    loss: Number = Field(description="cross-entropy of the right answers, nats per token")
    learning_rate: Number = Field(description="learning rate of the next step")


class TrainPart(Part):
    """Training. Records from before `steps` have the log alone."""

    log: list[dict[str, Any]] = Field(description="Trainer's log: loss, learning rate and gradient norm by step")
    steps: int | None = Field(None, description="optimizer steps taken")
    stopped: Literal["plateau", "max_steps"] | None = Field(
        None, description="why training ended: validation loss had stopped falling, or its greatest length was reached"
    )
    validation: list[ValidationPoint] | None = Field(None, description="the learning curve, in the order of steps")


class _AnyRecord(Part):
    version: Literal[1] = Field(alias="schema")
    id: str = Field(description="identity of the cell: 16 hex digits")
    experiment: str
    name: str = Field(description="label of the cell, with its seed")
    config: dict[str, Any] = Field(description="the resolved configuration (docs/settings.md)")


class FailedRecord(_AnyRecord):
    """A cell that raised an error."""

    status: Literal["failed"]
    error: str | None = None
    traceback: str | None = None
    provenance: dict[str, Any] | None = None


class FinishedRecord(_AnyRecord):
    """A cell that was trained and measured."""

    status: Literal["finished"]
    model: ModelPart
    data: DataPart
    accuracy: AccuracyPart | None = Field(None, description="null for benchmarks, which have scores of their own")
    benchmarks: BenchmarksPart | None = None
    answers: list[str] | None = Field(
        None,
        description="answer to each question with its image, up to the first token that is not in the right answer",
    )
    generated: GeneratedPart | None = None
    cost: CostPart | None = None
    attention: AttentionPart | None = None
    contribution: ContributionPart | None = None
    sinks: SinksPart | None = None
    removal: RemovalPart | None = None
    onset: OnsetPart | None = None
    knockout: KnockoutPart | None = None
    readout: ReadoutPart | None = None
    readout_note: str | None = Field(None, description="why there is no read-out, where one was asked for")
    photo_readout: PhotoReadoutPart | None = None
    lens: LensPart | None = None
    lens_note: str | None = Field(None, description="why there is no logit lens, where one was asked for")
    patch_words: PatchWordsPart | None = None
    swaps: SwapsPart | None = None
    fusion: dict[str, Depth | None] | None = Field(None, description="fusion depth by curve")
    train: TrainPart | None = None
    provenance: dict[str, Any]

    @model_validator(mode="after")
    def _consistent(self) -> FinishedRecord:
        examples, layers = self.data.examples, self.model.layers
        if self.benchmarks is None:
            self._check_questions()
        check_length("data.guess", self.data.guess, examples)
        if self.answers is not None and len(self.answers) != examples:
            raise ValueError(f"answers: has {len(self.answers)} entries for {examples} examples")
        if self.generated is not None:
            check_generated(self.generated, examples)
        _check_layer_parts(self, layers, examples)
        for name, task in (self.benchmarks.tasks if self.benchmarks else {}).items():
            if task.probes is not None:
                try:
                    _check_layer_parts(task.probes, layers, len(task.probes.documents))
                except ValueError as error:
                    raise ValueError(f"benchmarks.tasks.{name}.probes.{error}") from None
        if self.readout is not None:
            check_depths("readout", self.readout.depths, ("correct", "control"), self.readout.samples, layers)
        for entry in self.photo_readout.grids if self.photo_readout else ():
            for name in ("correct", "control"):
                check_length(f"photo_readout.{entry.grid_size}.{name}", getattr(entry, name), entry.photographs)
        if self.lens is not None:
            check_depths("lens", self.lens.depths, ("correct",), self.lens.samples, layers)
        if self.patch_words is not None:
            check_patch_words(self.patch_words, layers)
        if self.swaps is not None:
            check_swaps(self.swaps, layers)
        return self

    def _check_questions(self) -> None:
        """Check that every question has a type and outcomes."""
        examples, kinds = self.data.examples, self.data.kinds
        if kinds is None:
            raise ValueError("data.kinds: is missing")
        if len(kinds) != examples:
            raise ValueError(f"data.kinds: has {len(kinds)} entries for {examples} examples")
        if self.accuracy is None:
            raise ValueError("accuracy: is missing")
        for view in type(self.accuracy).model_fields:
            check_length(f"accuracy.{view}", getattr(self.accuracy, view), examples)


def _check_layer_parts(parts: FinishedRecord | BenchmarkProbes, layers: int, examples: int) -> None:
    """Check the analyses by layer of a record, or of one of its benchmarks."""
    if parts.removal is not None:
        check_removal(parts.removal, layers, examples)
    if parts.onset is not None:
        check_onset(parts.onset, layers, examples)
    if parts.knockout is not None:
        check_knockout(parts.knockout, layers, examples)
    if parts.attention is not None:
        check_attention(parts.attention, layers)
    if parts.contribution is not None:
        check_contribution(parts.contribution, layers)
    if parts.sinks is not None:
        check_sinks(parts.sinks, layers)


_RECORD: TypeAdapter[FinishedRecord | FailedRecord] = TypeAdapter(
    Annotated[FinishedRecord | FailedRecord, Field(discriminator="status")]
)


def check_record(record: Any) -> None:
    """Check a record.

    Args:
        record: What its JSON file holds.

    Raises:
        ValueError: If something is missing, of the wrong type or inconsistent, in one line that begins with the field.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a record must be a JSON object, found {type(record).__name__}")
    if record.get("schema") != SCHEMA:
        raise ValueError(f"schema: this version reads {SCHEMA}, found {record.get('schema')!r}")
    try:
        _RECORD.validate_python(record)
    except ValidationError as error:
        raise ValueError(_one_line(error.errors(include_url=False)[0])) from None


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a record."""
    return {"title": "Record", **_RECORD.json_schema(by_alias=True)}


def _one_line(error: Any) -> str:
    """Return pydantic's first error as one line: field, what is wrong, value."""
    path = ""
    for part in [part for part in error["loc"] if part not in ("finished", "failed")]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    if error["type"] == "value_error":  # raised by a validator above
        return f"{path}: {error['ctx']['error']}" if path else str(error["ctx"]["error"])
    if error["type"] == "missing":
        return f"{path}: is missing"
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return f"status: must be 'finished' or 'failed', found {error['input'].get('status')!r}"
    return f"{path}: {error['msg'][0].lower()}{error['msg'][1:]}, found {error['input']!r:.40}"


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=1))
