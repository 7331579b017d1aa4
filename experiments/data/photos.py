"""Splits of photographs, one alone or several on a grid, mixed with scenes of shapes."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from experiments.data.balanced_questions import TypedQuestion, draw_questions
from experiments.data.mixture import Mixture
from experiments.data.photo_questions import (
    DESCRIBE_PROMPT,
    describe_photos,
    photo_grid_questions,
    single_photo_questions,
)
from experiments.data.samples import (
    IndexedImageLoader,
    OneQuestionPerImage,
    Sample,
    Split,
    check_image_count,
    fingerprint,
    llava_conversation,
)
from experiments.data.shapes import load_shapes

GRID_SIZES = {"one": 1, "2x2": 2, "3x3": 3}
SHAPES_PART = "shapes"
MARGIN_COLOUR = (128, 128, 128)
VALIDATION_SHARE = 0.1  # of the training photographs, where there is a validation split


@dataclass(frozen=True)
class _GridLoader:
    """Makes an image. Loaders of the same photographs are equal: one photograph alone can be drawn repeatedly."""

    samples: PhotoGridSamples
    photos: tuple[int, ...]

    def __call__(self) -> Image.Image:
        return self.samples.render_photos(np.array(self.photos))


class LabelledPhotos(NamedTuple):
    """Photographs with their classes. `labels` are indices of `classes`."""

    images: UInt8[np.ndarray, "photos height width 3"]
    labels: Int[np.ndarray, " photos"]
    classes: Sequence[str]


class PhotoGridSamples(Sequence[Sample]):
    """Samples of grids of photographs, composed when the image is loaded.

    Each photograph is resized to whole patches of a vision tower, as many as fit. The rest of the image is a grey margin
    between photographs.

    Args:
        split: Name of the split, for the sample ids.
        photos: The photographs to draw from.
        count: How many images.
        seed: Seed of the drawn photographs and questions.
        grid_size: Photographs per side of the grid.
        side: Patches per side of an image.
        patch: Pixels per side of a patch.
        descriptions: "no" for questions alone, "last" for a description after the questions about a grid, "only" for
            descriptions alone.
    """

    def __init__(
        self,
        split: str,
        photos: LabelledPhotos,
        count: int,
        seed: int,
        grid_size: int,
        side: int,
        patch: int,
        descriptions: str,
    ) -> None:
        self.split, self.photos, self.seed, self.grid_size, self.patch = split, photos, seed, grid_size, patch
        self.side, self.photo_side, self.descriptions = side, side // grid_size, descriptions  # sides in patches
        self.starts = [i * (side - self.photo_side) // max(grid_size - 1, 1) for i in range(grid_size)]  # in patches
        rng = np.random.default_rng([seed, grid_size])
        self.photo_indices = rng.integers(len(photos.labels), size=(count, grid_size * grid_size))

    def __len__(self) -> int:
        return len(self.photo_indices)

    def class_names(self, index: int) -> list[str]:
        """Return the class of each photograph of an image, in reading order."""
        return [self.photos.classes[label] for label in self.photos.labels[self.photo_indices[index]]]

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        names = self.class_names(index)
        questions: list[TypedQuestion] = []
        if self.descriptions != "only":
            candidates = (
                single_photo_questions(names[0])
                if self.grid_size == 1
                else photo_grid_questions(names, self.photos.classes, self.grid_size)
            )
            rng = np.random.default_rng([self.seed, index])
            questions = draw_questions(candidates, dict.fromkeys(candidates, 1), rng)
        if self.descriptions == "only" or (self.descriptions == "last" and self.grid_size > 1):
            questions.append(("description", DESCRIBE_PROMPT, describe_photos(names, self.grid_size)))
        return Sample(
            f"photos-{self.split}-{self.seed}-{self.grid_size}-{index}",
            (IndexedImageLoader(index, _GridLoader(self, tuple(self.photo_numbers(index)))),),
            llava_conversation((question, answer) for _, question, answer in questions),
            [question_type for question_type, _, _ in questions],
        )

    def patches(self) -> Bool[np.ndarray, "cells patches"]:
        """Return whether each patch of an image lies on each photograph, both in reading order."""
        # Rows of the grid by rows of patches; columns are alike.
        covers = np.zeros((self.grid_size, self.side), dtype=bool)
        for row, start in zip(covers, self.starts, strict=True):
            row[start : start + self.photo_side] = True
        return np.einsum("ry,cx->rcyx", covers, covers).reshape(self.grid_size**2, self.side**2)

    def render(self, index: int) -> Image.Image:
        """Return the image: its photographs on a grey background."""
        return self.render_photos(self.photo_indices[index])

    def photo_numbers(self, index: int) -> list[int]:
        """Return which photographs an image shows, in reading order: their numbers in the file of the split."""
        return self.photo_indices[index].tolist()  # type: ignore[no-any-return]

    def render_photos(self, photos: Int[np.ndarray, " cells"]) -> Image.Image:
        """Return the image of a grid of photographs.

        Args:
            photos: Indices of the photographs, in reading order.
        """
        image = Image.new("RGB", (self.side * self.patch,) * 2, MARGIN_COLOUR)
        corners = [(x * self.patch, y * self.patch) for y in self.starts for x in self.starts]
        for corner, photo in zip(corners, self.photos.images[photos], strict=True):
            resized = Image.fromarray(photo).resize((self.photo_side * self.patch,) * 2, Image.Resampling.BICUBIC)
            image.paste(resized, corner)
        return image


def load_photos(
    folder: str,
    split: str,
    count: int,
    seed: int,
    parts: Sequence[str],
    side: int,
    patch: int,
    captions: bool,
    hold_out: bool = False,
) -> Split:
    """Generate a split of images from labelled photographs, with the parts in turn.

    Training conversations about a grid end with its description. Test images have one question each, the question types
    in turn.

    Args:
        folder: Holds `train.npz` and `test.npz` (`images` uint8 [n, height, width, 3], `labels` int [n]) and
            `classes.json` (a list of names). No photograph is used in two splits.
        split: "train", "validation" or "test". Photographs for validation are held out of `train.npz`.
        count: How many images, over all parts.
        seed: Seed of the drawn photographs, scenes and questions.
        parts: Kinds of image: "one" photograph, a "2x2" or "3x3" grid of photographs, and scenes of "shapes".
        side: Patches per side of an image.
        patch: Pixels per side of a patch.
        captions: Train on descriptions alone, as in LLaVA's first stage.
        hold_out: Whether there is a validation split: training then leaves out its photographs.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is not what it should be, a part is unknown, or photographs of a grid do not fit on a patch.
    """
    known_parts = [*GRID_SIZES, SHAPES_PART]
    if not parts or len(set(parts)) < len(parts) or set(parts) - set(known_parts):
        raise ValueError(f"data.parts: use any of {', '.join(known_parts)}, each at most once, found {list(parts)}")
    min_side = max(GRID_SIZES.get(part, 1) for part in parts)
    if patch < 1 or side < min_side:
        raise ValueError(
            f"data.side={side} data.patch={patch}: side must be at least {min_side}, a patch for each photograph, and "
            "patch at least 1"
        )
    photos, digest = read_photos(folder, "test" if split == "test" else "train")
    if split != "test" and hold_out:
        photos = _divide_photos(photos, split, seed)
        digest = fingerprint(digest, split, VALIDATION_SHARE)
    training = split == "train"
    descriptions = "no" if not training else "only" if captions else "last"
    prefixed_samples, shapes_fingerprints = [], []
    for number, part in enumerate(parts):
        part_count = len(range(number, check_image_count(count, split), len(parts)))
        if not part_count:
            break
        samples: Sequence[Sample]
        if part == SHAPES_PART:
            shapes = load_shapes(split, part_count, seed)
            samples = shapes.samples.with_descriptions() if descriptions == "only" else shapes.samples  # type: ignore[attr-defined]
            shapes_fingerprints.append(shapes.fingerprint)
        else:
            samples = PhotoGridSamples(split, photos, part_count, seed, GRID_SIZES[part], side, patch, descriptions)
        prefix = f"{SHAPES_PART} " if part == SHAPES_PART else ""
        prefixed_samples.append((prefix, samples if training else OneQuestionPerImage(samples)))
    return Split(
        split,
        Mixture(prefixed_samples),
        fingerprint("photos", digest, shapes_fingerprints, split, count, seed, list(parts), side, patch, captions),
        count,
    )


def photo_grids(samples: Sequence[Sample]) -> list[tuple[PhotoGridSamples, int] | None]:
    """Return the grid of photographs behind each sample of a split, and its index there.

    Args:
        samples: The samples of a split that `load_photos` made, or of another.

    Returns:
        One entry a sample, None where it has no grid of photographs: scenes of shapes, single photographs, other data.
    """
    if not isinstance(samples, Mixture):
        return [None] * len(samples)
    parts = [part.samples if isinstance(part, OneQuestionPerImage) else part for _, part in samples.parts]
    grids = [part if isinstance(part, PhotoGridSamples) and part.grid_size > 1 else None for part in parts]
    places = map(samples.locate, range(len(samples)))
    return [None if (grid := grids[part]) is None else (grid, number) for part, number in places]


def _divide_photos(photos: LabelledPhotos, split: str, seed: int) -> LabelledPhotos:
    """Return a random share of the training photographs for "validation", and the others for "train"."""
    order = np.random.default_rng(seed).permutation(len(photos.labels))
    held = max(round(VALIDATION_SHARE * len(order)), 1)
    chosen = np.sort(order[:held] if split == "validation" else order[held:])
    if not len(chosen):
        raise ValueError(f"data.validation_samples: {len(order)} training photographs are too few to hold out any")
    return LabelledPhotos(photos.images[chosen], photos.labels[chosen], photos.classes)


def read_photos(folder: str, split: str) -> tuple[LabelledPhotos, str]:
    """Read the photographs of a split.

    Returns:
        The photographs, and a hash of them.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is unreadable or holds something else, or its arrays do not go together.
    """
    source, names = Path(folder) / f"{split}.npz", Path(folder) / "classes.json"
    for path in (source, names):
        if not path.is_file():
            raise FileNotFoundError(f"data.photos: no file '{path}'")
    try:
        with np.load(source, allow_pickle=False) as arrays:
            photos, labels = arrays["images"], arrays["labels"]
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"data.photos: '{source}' holds no arrays images and labels: {error}") from error
    classes = _read_classes(names)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"data.photos: '{source}': expected labels int [n], found {labels.dtype} {labels.shape}")
    if (
        photos.dtype != np.uint8
        or photos.ndim != 4
        or photos.shape[-1] != 3
        or len(photos) != len(labels)
        or not len(labels)
    ):
        raise ValueError(
            f"data.photos: '{source}': expected images uint8 [n, height, width, 3] with n labels, found {photos.dtype} "
            f"{photos.shape}"
        )
    if not 0 <= labels.min() <= labels.max() < len(classes):
        raise ValueError(
            f"data.photos: '{source}': labels run from {labels.min()} to {labels.max()}, but '{names}' has {len(classes)} names"
        )
    return LabelledPhotos(photos, labels, classes), fingerprint(photos.tobytes(), labels.tobytes(), classes)


def _read_classes(path: Path) -> list[str]:
    try:
        classes = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"data.photos: '{path}' holds no list of class names: {error}") from error
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"data.photos: '{path}' must hold a list of class names, found {str(classes)[:80]}")
    return classes
