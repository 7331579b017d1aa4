"""Data sets: images with conversations in LLaVA's format."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.config import DataConfig, LlavaJsonData, PhotoGridData, ShapesData
from experiments.data.llava_json import load_llava_json
from experiments.data.photo_grid import load_photo_grid
from experiments.data.samples import Split, fingerprint
from experiments.data.shapes import load_shapes


@dataclass(frozen=True)
class Data:
    """What a cell trains and tests on; a set without a training split can only be tested on."""

    train: Split | None
    test: Split

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.train.fingerprint if self.train else None, self.test.fingerprint)


def load_data(config: DataConfig) -> Data:
    """The splits that a data config names.

    Raises:
        FileNotFoundError, ValueError: if a file is missing or is not what it should be; the message names the file.
    """
    if isinstance(config, ShapesData):
        test = load_shapes("test", config.test, config.seed)
        return Data(load_shapes("train", config.train, config.seed, config.rounds), test)
    if isinstance(config, PhotoGridData):
        splits = {
            split: load_photo_grid(config.photos, split, count, config.seed, config.grid, config.cell)
            for split, count in (("train", config.train), ("test", config.test))
        }
        return Data(**splits)
    if isinstance(config, LlavaJsonData):
        if config.test_path is None:
            return Data(None, load_llava_json(config.path, config.images, "test", config.test))
        return Data(
            load_llava_json(config.path, config.images, "train", config.train),
            load_llava_json(config.test_path, config.images, "test", config.test),
        )
    raise TypeError(f"no data set for a {type(config).__name__}")
