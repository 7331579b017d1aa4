"""The training and test split of a cell, loaded from its data config."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property

from experiments.config.schema import DataConfig, LlavaJsonData, PhotosData, ShapesData, ShapesVideoData
from experiments.data.llava_json import load_llava_json
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
    """

    train: Split | None
    test: Split

    @cached_property
    def text_only_baseline(self) -> TextOnlyBaseline:
        """The text-only baseline from the first TEXT_BASELINE_SAMPLES training conversations."""
        assert self.train
        return TextOnlyBaseline(self.train.samples[i] for i in range(min(TEXT_BASELINE_SAMPLES, len(self.train))))

    @property
    def fingerprint(self) -> str:
        """16 hex digits for both splits."""
        return fingerprint(self.train.fingerprint if self.train else None, self.test.fingerprint)


def load_data(config: DataConfig) -> DataSplits:
    """Load the splits that a data config names. They are cached for the next cell of this process.

    Raises:
        FileNotFoundError: If a file is missing; the message names it.
        ValueError: If a file is not what it should be; the message names it.
    """
    key = repr([config, file_stamps(getattr(config, name, None) for name in ("path", "test_path", "photos"))])
    if key not in _cached_splits:
        clear_data_cache()
        _cached_splits[key] = _load_splits(config)
    return _cached_splits[key]


def clear_data_cache() -> None:
    """Drop the cached splits, so that the next cell loads its own."""
    _cached_splits.clear()


def _load_splits(config: DataConfig) -> DataSplits:
    if isinstance(config, ShapesData):
        train = load_shapes("train", config.train_samples, config.seed, asdict(config.rounds))
        return DataSplits(train, _one_question_per_image(load_shapes("test", config.test_samples, config.seed)))
    if isinstance(config, ShapesVideoData):
        train, test = (
            load_shapes_video(split, count, config.seed, config.frames)
            for split, count in (("train", config.train_samples), ("test", config.test_samples))
        )
        return DataSplits(train, _one_question_per_image(test))
    if isinstance(config, PhotosData):
        return DataSplits(
            *(
                load_photos(
                    config.photos, split, count, config.seed, config.parts, config.side, config.patch, config.captions
                )
                for split, count in (("train", config.train_samples), ("test", config.test_samples))
            )
        )
    if isinstance(config, LlavaJsonData):
        path = config.test_path or config.path
        test = load_llava_json(path, config.images, "test", config.test_samples, config.frames)
        if config.test_path is None:
            return DataSplits(None, test)
        train = load_llava_json(config.path, config.images, "train", config.train_samples, config.frames)
        return DataSplits(train, test)
    raise TypeError(f"data: no loader for a {type(config).__name__}; add one to load.py")


def _one_question_per_image(split: Split) -> Split:
    return replace(split, samples=OneQuestionPerImage(split.samples))
