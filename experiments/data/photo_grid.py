"""Real photographs laid out in a grid, with questions about what is where, how many, and what is beside what."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from experiments.data.balanced import Pair, ask, beside, cell_name
from experiments.data.samples import Numbered, Sample, Split, at_least_one, conversation, fingerprint


def _some(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def questions(names: Sequence[str], classes: Sequence[str], grid: int) -> dict[str, list[Pair]]:
    """All questions of each kind about a grid that shows `names` in reading order."""
    counts = Counter(names)
    once = [i for i, name in enumerate(names) if counts[name] == 1]
    return {
        "place": [(f"What is at {cell_name(i, grid)}?", name) for i, name in enumerate(names)],
        "where": [(f"Where is the {names[i]}?", cell_name(i, grid)) for i in once],
        "count": [(f"How many pictures show {_some(c)}?", str(counts[c])) for c in classes],
        "existence": [(f"Is there {_some(c)}?", "yes" if counts[c] else "no") for c in classes],
        "beside": [(f"What is {word} the {names[i]}?", names[j]) for i in once for word, j in beside(i, grid)],
        "row": [(f"Which row holds the {names[i]}?", f"row {i // grid + 1}") for i in once],
    }


class PhotoGrids(Sequence[Sample]):
    """Grids of photographs, put together when they are asked for."""

    def __init__(
        self,
        split: str,
        photos: UInt8[np.ndarray, "photos height width 3"],
        labels: Int[np.ndarray, " photos"],
        classes: Sequence[str],
        count: int,
        seed: int,
        grid: int,
        cell: int,
    ) -> None:
        self.split, self.photos, self.labels, self.classes = split, photos, labels, classes
        self.seed, self.grid, self.cell = seed, grid, cell
        self.chosen = np.random.default_rng(seed).integers(len(photos), size=(count, grid * grid))

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        names = [self.classes[label] for label in self.labels[self.chosen[index]]]
        candidates = questions(names, self.classes, self.grid)
        asked = ask(candidates, dict.fromkeys(candidates, 1), np.random.default_rng([self.seed, index]))
        turns = conversation((question, answer) for _, question, answer in asked)
        kinds = [kind for kind, _, _ in asked]
        image = Numbered(index, partial(self.draw, index))
        return Sample(f"photos-{self.split}-{self.seed}-{index}", (image,), turns, kinds)

    def draw(self, index: int) -> Image.Image:
        side = self.grid * self.cell
        sheet = Image.new("RGB", (side, side))
        for i, photo in enumerate(self.photos[self.chosen[index]]):
            upscaled = Image.fromarray(photo).resize((self.cell, self.cell), Image.Resampling.BICUBIC)
            sheet.paste(upscaled, (i % self.grid * self.cell, i // self.grid * self.cell))
        return sheet


def load_photo_grid(folder: str, split: str, count: int, seed: int, grid: int, cell: int) -> Split:
    """`count` grids of `grid` x `grid` photographs, each `cell` pixels a side.

    `folder` holds `train.npz` and `test.npz` (`images` uint8 [n, height, width, 3], `labels` int [n]) and `classes.json`
    (a list of names); CIFAR-10 in this form is a few lines away (README). Photographs of one file are used in that
    split alone.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is not what it should be, or the grid has no cell.
    """
    if grid < 2 or cell < 1:
        raise ValueError(
            f"data.grid={grid} data.cell={cell}: a grid needs 2 or more photographs a side of 1 or more pixels"
        )
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
    samples = PhotoGrids(split, photos, labels, classes, at_least_one(count, split), seed, grid, cell)
    whole = fingerprint(photos.tobytes(), labels.tobytes(), classes, split, count, seed, grid, cell)
    return Split(split, samples, whole, count)
