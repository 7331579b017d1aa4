"""Settings of the data sets."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import MISSING

from experiments.config.fields import group, require_at_least, setting

BAD_ENTRIES = ("stop", "skip")
SCORES = ("exact", "vqa", "gqa")


@dataclass
class DataConfig:
    """A data set with a training and a test split, and a validation split where the learning curve is measured."""

    name: str = setting(MISSING, "name of the data set in tables")
    train_samples: int = setting(0, "training samples (images with their questions); 0 for all of a finite set")
    test_samples: int = setting(0, "test samples, one question asked of each; 0 for all of a finite set")
    validation_samples: int = setting(
        0, "validation samples, for the learning curve; a finite set holds them out of its training samples"
    )
    seed: int = setting(0, "seed of generated data, and of the shares of several files")
    max_length: int | None = setting(
        None,
        "tokens of a sample, as transformers' max_length: a longer one loses its last turns, then the end of its "
        "question; none refuses samples that exceed the model's positions",
    )

    def __post_init__(self) -> None:
        counts = ("train_samples", "test_samples", "validation_samples")
        require_at_least("data", self, dict.fromkeys((*counts, "seed"), 0))


@dataclass
class ShapesRounds:
    """Questions of each type per training image."""

    place: int = setting(1, "questions about the colour or shape at a row and column")
    existence: int = setting(1, "questions whether there is a shape of a colour")
    count: int = setting(1, "questions how many there are")
    relation: int = setting(1, "questions about the neighbour of a shape")
    comparison: int = setting(1, "questions whether one colour or shape is more frequent than another")
    reading: int = setting(1, "questions about the order from left to right, top to bottom")

    def __post_init__(self) -> None:
        names = [field.name for field in fields(self)]
        require_at_least("data.rounds", self, dict.fromkeys(names, 0))
        if not any(getattr(self, name) for name in names):
            raise ValueError(f"data.rounds: all of {', '.join(names)} are 0; an image needs at least one question")


@dataclass
class ShapesData(DataConfig):
    """Generated scenes of coloured shapes (experiments/data/shapes.py)."""

    rounds: ShapesRounds = group(ShapesRounds, "questions of each type per training image")


@dataclass
class ShapesVideoData(DataConfig):
    """Generated clips of coloured shapes, one frame a second (experiments/data/shapes_video.py)."""

    frames: int = setting(0, "frames of each clip, evenly spaced; 0 for one a second")


@dataclass
class LlavaJsonData(DataConfig):
    """Conversations in LLaVA's JSON format.

    Raises:
        ValueError: If a value is out of range, or there are several files without a test file.
    """

    path: Any = setting(
        MISSING, "JSON file, or a list of them; without test_path it is one and all of it is the test split"
    )
    images: Any = setting(MISSING, "folder that holds the images and videos, or a list with one for each file of path")
    shares: list[float] = setting(
        [], "how often the entries of each file of path are taken: 0.5 draws half, 2 takes each twice; empty for once"
    )
    test_path: str | None = setting(None, "JSON file of the test split; `path` is then the training split")
    test_images: str | None = setting(None, "folder of the test split's images and videos, if another than `images`")
    frames: int = setting(8, "frames of each video, evenly spaced (8 in the released training code)")
    bad: str = setting(
        "stop",
        "entries that cannot be used (malformed, or an image or video is missing or damaged): stop ends the run before "
        "training; skip leaves them out, and lists them in the results folder",
    )
    score: str = setting(
        "exact",
        "metric of the test split: exact is accuracy (teacher-forced exact match) alone; vqa and gqa also generate answers, "
        "scored by VQA accuracy, or by GQA's exact match without case and punctuation (docs/data.md)",
    )
    max_new_tokens: int = setting(16, "tokens of a generated answer, at most")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("bad", BAD_ENTRIES), ("score", SCORES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"data.{name}: unknown '{getattr(self, name)}'; use {' or '.join(choices)}")
        require_at_least("data", self, {"max_new_tokens": 1})
        for name in ("path", "images"):
            given = getattr(self, name)
            if not (isinstance(given, str) and given) and not (
                isinstance(given, list) and given and all(isinstance(part, str) for part in given)
            ):
                raise ValueError(f"data.{name}: must be a path or a list of paths, found {given!r}")
        for share in self.shares:
            if not 0 < share < math.inf:
                raise ValueError(f"data.shares: each must be more than 0, found {share}")
        if self.test_path is None and (isinstance(self.path, list) or self.shares or self.test_images):
            raise ValueError(
                "data.test_path: missing; several files, shares and test_images need a training and a test split"
            )
        if self.test_path is not None and self.test_images is None and isinstance(self.images, list):
            raise ValueError(
                f"data.test_images: missing; data.images names {len(self.images)} folders, so name that of the test split"
            )


@dataclass
class PhotosData(DataConfig):
    """Photographs alone and in grids, and scenes of shapes (experiments/data/photos.py)."""

    photos: str = setting(MISSING, "folder with train.npz, test.npz and classes.json")
    parts: list[str] = setting(["one", "2x2", "3x3", "shapes"], "kinds of image, taken in turn")
    side: int = setting(16, "patches per side of an image")
    patch: int = setting(14, "pixels per side of a patch")
    captions: bool = setting(False, "train on descriptions alone, as in LLaVA's first stage")


@dataclass
class LmmsData(DataConfig):
    """Public benchmarks by lmms-eval, after training on conversations in LLaVA's JSON format if `path` names any.

    The first `test_samples` documents of each task are answered.

    Raises:
        ValueError: If no task is named, or one twice, or a setting of the training split lacks another.
    """

    tasks: list[str] = setting(MISSING, "tasks and groups of lmms-eval (docs/benchmarks.md): [gqa,pope]")
    include: list[str] = setting([], "folders with further task files; a task there cannot replace one of lmms-eval")
    frames: int | None = setting(None, "evenly spaced frames of a benchmark's video; none takes one a second")
    max_frames: int | None = setting(None, "largest number of frames of a benchmark's video; none for no limit")
    path: str | None = setting(None, "JSON file of the training split; none for a model that is not trained")
    images: str | None = setting(None, "folder of the training split's images and videos")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks:
            raise ValueError("data.tasks: names no task; list at least one, as data.tasks=[gqa,pope]")
        if isinstance(self.tasks, list) and (twice := [name for name in self.tasks if self.tasks.count(name) > 1]):
            raise ValueError(f"data.tasks: names '{twice[0]}' twice; list each task once")
        for name in ("frames", "max_frames"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"data.{name}: must be at least 1, found {number}")
        if (self.path is None) != (self.images is None):
            missing, given = ("path", "images") if self.path is None else ("images", "path")
            raise ValueError(
                f"data.{missing}: missing; data.{given}={getattr(self, given)} is half of a training split"
            )
        if self.validation_samples and self.path is None:
            raise ValueError(
                f"data.validation_samples: {self.validation_samples} entries are held out of a training split, and there "
                "is none; set data.path and data.images"
            )


DATA: dict[str, type] = {
    "shapes": ShapesData,
    "shapes_video": ShapesVideoData,
    "llava_json": LlavaJsonData,
    "photos": PhotosData,
    "lmms": LmmsData,
}
