"""Real photographs, one alone or several on a grid, with questions about them; and what they are mixed from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from experiments.data.balanced_questions import ask
from experiments.data.mixture import Mixture
from experiments.data.photo_questions import DESCRIBE, about_grid, about_one, description
from experiments.data.samples import Numbered, OneQuestionEach, Sample, Split, at_least_one, conversation, fingerprint
from experiments.data.shapes import load_shapes

GRIDS = {"one": 1, "2x2": 2, "3x3": 3}
SHAPES = "shapes"
BETWEEN = (128, 128, 128)


class Photos(NamedTuple):
    """Photographs of known classes."""

    images: UInt8[np.ndarray, "photos height width 3"]
    labels: Int[np.ndarray, " photos"]
    classes: Sequence[str]


class Sheets(Sequence[Sample]):
    """Sheets of `grid` x `grid` photographs, put together when they are asked for.

    A photograph is scaled to cover whole patches of a vision tower, as many as there is room for; what is left lies
    between them, grey.

    Args:
        side: Of a sheet, in patches of `patch` pixels.
        described: Each conversation ends with a description of all that there is to see, or is nothing else.
    """

    def __init__(
        self, split: str, photos: Photos, count: int, seed: int, grid: int, side: int, patch: int, described: str
    ) -> None:
        self.split, self.photos, self.seed, self.grid, self.patch = split, photos, seed, grid, patch
        self.side, self.cell, self.described = side, side // grid, described
        self.starts = [i * (side - self.cell) // max(grid - 1, 1) for i in range(grid)]  # in patches
        self.chosen = np.random.default_rng([seed, grid]).integers(len(photos.labels), size=(count, grid * grid))

    def __len__(self) -> int:
        return len(self.chosen)

    def names(self, index: int) -> list[str]:
        """Of the classes of a sheet's photographs, in reading order."""
        return [self.photos.classes[label] for label in self.photos.labels[self.chosen[index]]]

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        names = self.names(index)
        asked = []
        if self.described != "only":
            candidates = about_one(names[0]) if self.grid == 1 else about_grid(names, self.photos.classes, self.grid)
            asked = ask(candidates, dict.fromkeys(candidates, 1), np.random.default_rng([self.seed, index]))
        if self.described == "only" or (self.described == "last" and self.grid > 1):
            asked.append(("description", DESCRIBE, description(names, self.grid)))
        turns = conversation((question, answer) for _, question, answer in asked)
        image = Numbered(index, partial(self.draw, index))
        return Sample(f"photos-{self.split}-{self.seed}-{self.grid}-{index}", (image,), turns, [k for k, _, _ in asked])

    def draw(self, index: int) -> Image.Image:
        """A sheet's pixels."""
        sheet = Image.new("RGB", (self.side * self.patch,) * 2, BETWEEN)
        corners = [(x * self.patch, y * self.patch) for y in self.starts for x in self.starts]
        for corner, photo in zip(corners, self.photos.images[self.chosen[index]], strict=True):
            scaled = Image.fromarray(photo).resize((self.cell * self.patch,) * 2, Image.Resampling.BICUBIC)
            sheet.paste(scaled, corner)
        return sheet


def load_photos(
    folder: str, split: str, count: int, seed: int, parts: Sequence[str], side: int, patch: int, captions: bool
) -> Split:
    """`count` pictures of each of `parts` in turn: `one` photograph, `2x2` and `3x3` grids of them, and scenes of `shapes`.

    Training conversations about a grid end with its description; test pictures have one question each, the kinds in turn.

    Args:
        folder: Holds `train.npz` and `test.npz` (`images` uint8 [n, height, width, 3], `labels` int [n]) and `classes.json`
            (a list of names); README, "Photographs". Photographs of one file are used in that split alone.
        side: Of a picture, in patches of `patch` pixels.
        captions: Descriptions alone, as LLaVA's first stage has them, in training.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is not what it should be, there is no such part, or a grid has no room for a photograph.
    """
    known = [*GRIDS, SHAPES]
    if not parts or len(set(parts)) < len(parts) or set(parts) - set(known):
        raise ValueError(f"data.parts: {list(parts)}; name some of {', '.join(known)}, each once")
    if patch < 1 or side < (least := max(GRIDS.get(part, 1) for part in parts)):
        raise ValueError(f"data.side={side} data.patch={patch}: {least} photographs a side need at least a patch each")
    photos, digest = read_photos(folder, split)
    training = split == "train"
    described = "no" if not training else "only" if captions else "last"
    made, prints = [], []
    for number, part in enumerate(parts):
        if not (share := len(range(number, at_least_one(count, split), len(parts)))):
            break
        samples: Sequence[Sample]
        if part == SHAPES:
            shapes = load_shapes(split, share, seed)
            samples = shapes.samples.described() if described == "only" else shapes.samples  # type: ignore[attr-defined]
            prints.append(shapes.fingerprint)
        else:
            samples = Sheets(split, photos, share, seed, GRIDS[part], side, patch, described)
        made.append((f"{SHAPES} " if part == SHAPES else "", samples if training else OneQuestionEach(samples)))
    return Split(
        split,
        Mixture(made),
        fingerprint("photos", digest, prints, split, count, seed, list(parts), side, patch, captions),
        count,
    )


def read_photos(folder: str, split: str) -> tuple[Photos, str]:
    """The photographs of a split's file, and a digest of them."""
    source, names = Path(folder) / f"{split}.npz", Path(folder) / "classes.json"
    for path in (source, names):
        if not path.is_file():
            raise FileNotFoundError(f"data.photos: no file '{path}'")
    try:
        with np.load(source, allow_pickle=False) as arrays:
            photos, labels = arrays["images"], arrays["labels"]
        classes = json.loads(names.read_text())
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"data.photos: '{folder}' holds no images, labels and class names: {error}") from error
    if (
        photos.dtype != np.uint8
        or photos.ndim != 4
        or photos.shape[-1] != 3
        or len(photos) != len(labels)
        or not len(labels)
    ):
        raise ValueError(
            f"'{source}': expected images uint8 [n, height, width, 3] with n labels, found {photos.dtype} {photos.shape}"
        )
    if not 0 <= labels.min() <= labels.max() < len(classes):
        raise ValueError(f"'{source}': labels run to {labels.max()}, and '{names}' has {len(classes)} names")
    return Photos(photos, labels, classes), fingerprint(photos.tobytes(), labels.tobytes(), classes)
