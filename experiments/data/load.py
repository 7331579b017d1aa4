"""The training and test split of a cell, loaded from its data config."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.config.data_schema import DataConfig, LlavaJsonData, LmmsData, PhotosData, ShapesData, ShapesVideoData
from experiments.data.bad_entries import BadEntry
from experiments.data.held_out import hold_out
from experiments.data.llava_json import LlavaJsonSamples, load_llava_json
from experiments.data.lmms import load_benchmarks
from experiments.data.photos import load_photos
from experiments.data.samples import OneQuestionPerImage, Split, TextOnlyBaseline, fingerprint
from experiments.data.shapes import load_shapes
from experiments.data.shapes_video import load_shapes_video
from experiments.files import file_stamps

TEXT_BASELINE_SAMPLES = 5000
_cached_splits: dict[str, DataSplits] = {}  # at most one entry: what this process loaded last


@dataclass(frozen=True)
class DataSplits:
    """The data of a cell. Without a training split it can only be tested on.

    Generated data tests one question per image. A JSON file of the user's own tests all of its questions: intervals then
    treat questions about one image as independent.

    Args:
        train: Training split, None where the model can only be tested.
        test: Test split.
        validation: Split for the learning curve, None without `data.validation_samples`. It shares no image with training.
    """

    train: Split | None
    test: Split
    validation: Split | None = None

    @cached_property
    def text_only_baseline(self) -> TextOnlyBaseline:
        """The text-only baseline from the first TEXT_BASELINE_SAMPLES training conversations."""
        assert self.train
        return TextOnlyBaseline(self.train.samples[i] for i in range(min(TEXT_BASELINE_SAMPLES, len(self.train))))

    @property
    def fingerprint(self) -> str:
        """16 hex digits for all splits."""
        splits = (self.train, self.test, *([self.validation] if self.validation else []))
        return fingerprint(*(split.fingerprint if split else None for split in splits))

    @property
    def skipped(self) -> dict[str, tuple[BadEntry, ...]] | None:
        """Entries that are left out, by the split that they would be in; None where `data.bad` leaves out none."""
        if self.test.skipped is None:
            return None
        return {split.name: split.skipped or () for split in (self.train, self.test) if split}


def load_data(config: DataConfig, cache: Path | None = None) -> DataSplits:
    """Load the splits that a data config names. They are cached for the next cell of this process.

    Args:
        config: The data config.
        cache: Folder that keeps which image and video files could be decoded, where `data.bad` asks for it.

    Raises:
        FileNotFoundError: If a file is missing; the message names it.
        ValueError: If a file is not what it should be; the message names it.
    """
    given = [getattr(config, name, None) for name in ("path", "test_path", "photos", "include")]
    files = [path for paths in given for path in (paths if isinstance(paths, list) else [paths])]
    key = repr([config, file_stamps(files)])
    if key not in _cached_splits:
        clear_data_cache()
        _cached_splits[key] = _load_splits(config, cache)
    return _cached_splits[key]


def clear_data_cache() -> None:
    """Drop the cached splits, so that the next cell loads its own."""
    _cached_splits.clear()


def _load_splits(config: DataConfig, cache: Path | None) -> DataSplits:
    measured = {"test": config.test_samples}
    if config.validation_samples:
        measured["validation"] = config.validation_samples
    if isinstance(config, ShapesData):
        return DataSplits(
            load_shapes("train", config.train_samples, config.seed, asdict(config.rounds)),
            *(_one_question_per_image(load_shapes(split, count, config.seed)) for split, count in measured.items()),
        )
    if isinstance(config, ShapesVideoData):
        return DataSplits(
            load_shapes_video("train", config.train_samples, config.seed, config.frames),
            *(
                _one_question_per_image(load_shapes_video(split, count, config.seed, config.frames))
                for split, count in measured.items()
            ),
        )
    if isinstance(config, PhotosData):
        return DataSplits(
            *(
                load_photos(
                    config.photos,
                    split,
                    count,
                    config.seed,
                    config.parts,
                    config.side,
                    config.patch,
                    config.captions,
                    hold_out=config.validation_samples > 0,
                )
                for split, count in {"train": config.train_samples, **measured}.items()
            )
        )
    if isinstance(config, LlavaJsonData):
        options: dict[str, Any] = {"frames": config.frames, "bad": config.bad, "cache": cache}
        path, images = config.test_path or config.path, config.test_images or config.images
        test = load_llava_json(path, images, "test", config.test_samples, annotators=config.score == "vqa", **options)
        if config.test_path is None:
            if config.validation_samples:
                raise ValueError(
                    f"data.validation_samples: {config.validation_samples} entries are held out of a training split, and "
                    "there is none; set data.test_path, and data.path becomes the training split"
                )
            return DataSplits(None, test)
        train = load_llava_json(
            config.path, config.images, "train", config.train_samples, shares=config.shares, seed=config.seed, **options
        )
        return _with_validation(train, test, config)
    if isinstance(config, LmmsData):
        test = load_benchmarks(config.include)
        if config.path is None or config.images is None:
            return DataSplits(None, test)
        train = load_llava_json(config.path, config.images, "train", config.train_samples, seed=config.seed)
        return _with_validation(train, test, config)
    raise TypeError(f"data: no loader for a {type(config).__name__}; add one to load.py")


def _with_validation(train: Split, test: Split, config: DataConfig) -> DataSplits:
    """Return splits of conversations, with a validation split held out of the training split if one is asked for."""
    if not config.validation_samples:
        return DataSplits(train, test)
    assert isinstance(train.samples, LlavaJsonSamples)
    train, validation = hold_out(train, train.samples.media(), config.validation_samples, config.seed)
    return DataSplits(train, test, validation)


def _one_question_per_image(split: Split) -> Split:
    return replace(split, samples=OneQuestionPerImage(split.samples))
