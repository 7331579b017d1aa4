"""A validation split held out of training entries, so that no image or video is in both."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from experiments.data.samples import Sample, Split, fingerprint


class SelectedSamples(Sequence[Sample]):
    """Some samples of a sequence.

    Args:
        samples: All samples.
        indices: Which of them, in order.
    """

    def __init__(self, samples: Sequence[Sample], indices: Sequence[int]) -> None:
        self.samples, self.indices = samples, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        return self.samples[self.indices[index]]


def hold_out(train: Split, media: Sequence[Iterable[str]], count: int, seed: int) -> tuple[Split, Split]:
    """Divide a training split into training and validation.

    Entries that share an image or a video, directly or through other entries, stay together. Groups of entries are drawn
    in random order until the validation split has enough.

    Args:
        train: The training split.
        media: Paths of the images and videos of each of its samples.
        count: Least number of samples for validation.
        seed: Seed of the draw.

    Returns:
        The samples that remain for training, and those for validation. Both keep the order of `train`.

    Raises:
        ValueError: If no sample remains for training.

    Example:
        >>> split = Split("train", ["a", "b", "c"], "0123456789abcdef")
        >>> rest, validation = hold_out(split, [["1.png"], ["2.png"], ["2.png"]], 1, seed=0)
        >>> list(rest.samples), list(validation.samples)
        (['b', 'c'], ['a'])
    """
    groups = _entries_by_media(media)
    held: set[int] = set()
    for number in np.random.default_rng(seed).permutation(len(groups)):
        if len(held) >= count:
            break
        held.update(groups[number])
    if len(held) == len(train):
        raise ValueError(
            f"data.validation_samples: {count} of {len(train)} training entries leave none to train on; entries with the "
            "same image or video are held out together"
        )
    parts = {
        "train": [index for index in range(len(train)) if index not in held],
        "validation": sorted(held),
    }
    rest, validation = (
        replace(
            train,
            name=name,
            samples=SelectedSamples(train.samples, indices),
            fingerprint=fingerprint(train.fingerprint, name, count, seed),
        )
        for name, indices in parts.items()
    )
    return rest, validation


def _entries_by_media(media: Sequence[Iterable[str]]) -> list[list[int]]:
    """Return groups of entries that share no image or video with another group, in the order of their first entries."""
    parent = list(range(len(media)))

    def root(entry: int) -> int:
        while parent[entry] != entry:
            parent[entry] = parent[parent[entry]]
            entry = parent[entry]
        return entry

    first_entry: dict[str, int] = {}
    for entry, paths in enumerate(media):
        for path in paths:
            parent[root(entry)] = root(first_entry.setdefault(os.path.abspath(path), entry))
    groups: dict[int, list[int]] = {}
    for entry in range(len(media)):
        groups.setdefault(root(entry), []).append(entry)
    return list(groups.values())
