"""Data sets: images with conversations in LLaVA's format."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property

from experiments.config.schema import DataConfig, LlavaJsonData, PhotosData, ShapesData, ShapesVideoData
from experiments.data.llava_json import load_llava_json
from experiments.data.photos import load_photos
from experiments.data.samples import OneQuestionEach, Split, TextGuess, fingerprint
from experiments.data.shapes import load_shapes
from experiments.data.shapes_video import load_shapes_video
from experiments.files import stamps

GUESS_IMAGES = 5000


@dataclass(frozen=True)
class Data:
    """What a cell trains and tests on; a set without a training split can only be tested on.

    Generated sets test one question a picture. A file of your own tests all of its questions: intervals then treat
    questions about one picture as if they were independent.
    """

    train: Split | None
    test: Split

    @cached_property
    def guess(self) -> TextGuess:
        """What GUESS_IMAGES training conversations tell without their pictures."""
        assert self.train
        return TextGuess(self.train.samples[i] for i in range(min(GUESS_IMAGES, len(self.train))))

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.train.fingerprint if self.train else None, self.test.fingerprint)


def _one_question_each(split: Split) -> Split:
    return replace(split, samples=OneQuestionEach(split.samples))


_last: dict[str, Data] = {}  # what this process loaded last


def load_data(config: DataConfig) -> Data:
    """The splits that a data config names, kept for the next cell of this process.

    Raises:
        FileNotFoundError, ValueError: if a file is missing or is not what it should be; the message names the file.
    """
    key = repr([config, stamps(getattr(config, name, None) for name in ("path", "test_path", "photos"))])
    if key not in _last:
        forget()
        _last[key] = _load(config)
    return _last[key]


def forget() -> None:
    """Let go of the data that is kept: the next cell loads its own."""
    _last.clear()


def _load(config: DataConfig) -> Data:
    if isinstance(config, ShapesData):
        train = load_shapes("train", config.train, config.seed, asdict(config.rounds))
        return Data(train, _one_question_each(load_shapes("test", config.test, config.seed)))
    if isinstance(config, ShapesVideoData):
        train, test = (
            load_shapes_video(split, count, config.seed, config.frames)
            for split, count in (("train", config.train), ("test", config.test))
        )
        return Data(train, _one_question_each(test))
    if isinstance(config, PhotosData):
        return Data(
            *(
                load_photos(
                    config.photos, split, count, config.seed, config.parts, config.side, config.patch, config.captions
                )
                for split, count in (("train", config.train), ("test", config.test))
            )
        )
    if isinstance(config, LlavaJsonData):
        test = load_llava_json(config.test_path or config.path, config.images, "test", config.test, config.frames)
        if config.test_path is None:
            return Data(None, test)
        return Data(load_llava_json(config.path, config.images, "train", config.train, config.frames), test)
    raise TypeError(f"no data set for a {type(config).__name__}")
