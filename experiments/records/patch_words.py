"""The part of a record on the words of image patches."""

from __future__ import annotations

from pydantic import Field

from experiments.records.part import Part


class PatchWordsOfLens(Part):
    """Patches that a lens names right after some layers."""

    right: list[int] = Field(description="their number, by image")
    chance: float = Field(description="share that the same words name right if dealt to the patches at random")


class PatchWordsDepth(Part):
    """Patches named right by each lens after some layers."""

    logit: PatchWordsOfLens
    contextual: PatchWordsOfLens


class PatchWordsPart(Part):
    """Words of patches of generated scenes: by the logit lens, and by the nearest contextual embedding."""

    label: str = Field(description="what the word must name")
    images: int = Field(description="number of scenes")
    patches: list[int] = Field(description="patches that lie on an object, by image")
    corpus_words: int = Field(description="words of the corpus that the contextual lens compares with")
    depths: list[PatchWordsDepth] = Field(description="after 0, 1, ... all layers")
