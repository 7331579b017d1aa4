"""What a record holds of attention, removal, onset and knock-out: by question, or by document of a benchmark."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from experiments.records.part import Part

Outcomes = Annotated[str, StringConstraints(pattern="^[01]*$")]
Number = float
CurvesByPair = list[list[list[float | None]]]
MeansByPair = list[list[float | None]]


class AttentionControl(Part):
    """The same statistics in a control model, means over samples."""

    name: str | None = Field(None, description="the control model")
    mass: MeansByPair | None = Field(None, description="[pairs, layers]")
    entropy: MeansByPair | None = Field(None, description="[pairs, layers]")


class AttentionPart(Part):
    """Attention from a target to a source group, mean over heads."""

    pairs: list[list[str]] = Field(description="target and source of each pair")
    samples: int = Field(description="number of questions")
    mass: CurvesByPair = Field(description="[pairs, layers, samples], from 0 to 1; null where undefined")
    entropy: CurvesByPair = Field(description="[pairs, layers, samples], nats; null where undefined")
    uniform_mass: list[float] | None = Field(None, description="[pairs], of attention spread evenly")
    uniform_entropy: list[float] | None = Field(None, description="[pairs], of attention spread evenly")
    control: AttentionControl | None = None


class ContributionControl(Part):
    """The same statistic in a control model, means over samples."""

    name: str | None = Field(None, description="the control model")
    share: MeansByPair | None = Field(None, description="[pairs, layers]")


class ContributionPart(Part):
    """How much a source group adds to the attention's output of a target group."""

    pairs: list[list[str]] = Field(description="target and source of each pair")
    samples: int = Field(description="number of questions")
    share: CurvesByPair = Field(
        description="[pairs, layers, samples], norm of what the source adds over the sum of all sources' norms"
    )
    by_head: CurvesByPair = Field(description="[pairs, layers, heads], norm of what the source adds, mean over samples")
    control: ContributionControl | None = None


class SinksPart(Part):
    """Visual tokens that take large attention from nearly every query and head."""

    targets: list[str] = Field(description="groups whose queries count")
    samples: int
    by_attention: list[list[int]] = Field(description="[layers, samples], number of sinks by attention")
    by_value: list[list[int]] = Field(description="[layers, samples], number of sinks by value norm")
    mass: list[list[list[float]]] = Field(description="[targets, layers, samples], attention on sinks by attention")
    tokens: list[list[float]] | None = Field(
        None, description="[layers, visual tokens], share of samples in which a token is a sink by attention"
    )
    left_out: bool = Field(False, description="whether mass, entropy and contribution count no sink")


class Intervention(Part):
    """Outcomes with an intervention in some layers."""

    layers: list[int] = Field(description="the layers, counted from 0")
    correct: Outcomes


class Depth(Part):
    """A fusion depth with its 95% bootstrap interval, in layers; null where there is none."""

    depth: int | None
    low: Number | None
    high: Number | None
    layers: int = Field(description="layers of the language model")

    @model_validator(mode="after")
    def _interval(self) -> Depth:
        if self.depth is not None and (self.low is None or self.high is None):
            raise ValueError("has a depth but no interval")
        return self


class RemovalPart(Part):
    """Outcomes without visual tokens in some layers."""

    block: int | None = Field(None, description="layers of a block")
    inside: list[Intervention] = Field(min_length=1, description="removed inside one block of layers")
    onward: list[Intervention] = Field(min_length=1, description="removed from a layer to the last")
    random_inside: list[Intervention] | None = Field(None, description="as many text tokens removed instead")
    by_kind: dict[str, Depth] | None = Field(
        None, description="fusion depth by type of question, of those with at least 6"
    )


class Onset(Part):
    """A fusion onset with its 95% bootstrap interval, as layers counted from 1; null where there is none."""

    onset: int | None = Field(description="first layer that needs the image")
    low: int | None
    high: int | None
    layers: int = Field(description="layers of the language model")


class OnsetPart(Part):
    """Outcomes without visual tokens in the first layers."""

    block: int | None = Field(None, description="layers of a block")
    upto: list[Intervention] = Field(min_length=2, description="removed in no layer, in the first layers, in all")
    estimate: Onset | None = None
    by_kind: dict[str, Onset] | None = Field(
        None, description="fusion onset by type of question, of those with at least 6"
    )


class KnockoutPart(Part):
    """Outcomes with attention from text to vision blocked in windows of layers."""

    width: int = Field(description="layers of a window")
    windows: list[Intervention] = Field(description="the intact model, then every window in order")
