"""The typed configuration of one cell. Hydra refuses what does not fit these classes before anything runs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf


@dataclass
class ModelConfig:
    """Where a LLaVA comes from. `name` is what tables call it."""

    name: str = MISSING
    dtype: str = "float32"  # any torch dtype: float32, bfloat16, float16
    attention: str = "sdpa"  # sdpa, eager, flash_attention_2


@dataclass
class CheckpointModel(ModelConfig):
    """A saved LLaVA or LLaVA-Mini: a folder or a name on the model hub."""

    path: str = MISSING


@dataclass
class JoinedModel(ModelConfig):
    """A LLaVA made of a vision directory and a language directory, with a projector drawn from the seed."""

    vision: str = MISSING
    language: str = MISSING
    vision_layer: int = -2


@dataclass
class TrainConfig:
    """What transformers' Trainer is given. `steps: 0` trains nothing."""

    steps: int = 0
    optimizer: str = "adamw"  # adamw, or muon (experiments/optimizer.py)
    batch_size: int = 32  # images a step, over all devices and accumulation steps on one process
    learning_rate: float = 1e-3
    warmup: int = 20  # steps
    schedule: str = "cosine"
    weight_decay: float = 0.01
    adam_beta2: float = 0.98
    train_vision: bool = False
    bf16: bool = False
    save_every: int = 100  # steps between checkpoints that a cut run resumes from


@dataclass
class ScratchModel(ModelConfig):
    """A small LLaVA with nothing learned; see experiments/tiny.py."""

    patch: int = 8  # pixels a side
    width: int = 128
    layers: int = 6
    vocabulary: int = 512  # at most
    tower: TrainConfig = field(default_factory=TrainConfig)  # first it learns to see (experiments/tower.py),
    describe: TrainConfig = field(default_factory=TrainConfig)  # then to say what is where; the cell's training is last


@dataclass
class CompressorConfig:
    """LLaVA-Mini's compressor (paper section 4.1). `none` hands all patches to the language model."""

    name: str = "none"
    size: int = 1  # C: the language model sees C x C tokens


@dataclass
class PrefusionConfig:
    """LLaVA-Mini's modality pre-fusion (paper section 4.1). 0 layers and no compressor is plain LLaVA."""

    layers: int = 0
    init: str = "language_model"  # copy the language model's first layers, or fresh


@dataclass
class DataConfig:
    name: str = MISSING
    train: int = 0  # images to train on; 0 takes all where the set is finite
    test: int = 0  # images to test on; 0 takes all where the set is finite
    seed: int = 0


@dataclass
class ShapesRounds:
    """How many questions of each kind are asked about a training image."""

    place: int = 1
    existence: int = 1
    count: int = 1
    relation: int = 1
    comparison: int = 1
    reading: int = 1


@dataclass
class ShapesData(DataConfig):
    rounds: ShapesRounds = field(default_factory=ShapesRounds)


@dataclass
class LlavaJsonData(DataConfig):
    """LLaVA-format JSON. Without `test_path` all of `path` is the test split and there is no training split."""

    path: str = MISSING
    images: str = MISSING
    test_path: str | None = None


@dataclass
class PhotoGridData(DataConfig):
    """Photographs laid out in grids. `photos` holds train.npz, test.npz and classes.json (README, "Photographs")."""

    photos: str = MISSING
    grid: int = 2  # photographs a side
    cell: int = 112  # pixels a side of a photograph


@dataclass
class ProbeConfig:
    """What is measured on the test questions beyond accuracy."""

    controls: bool = False  # accuracy with a blank and with another question's picture
    attention: bool = False  # mass and entropy between token groups by layer (paper Figs. 2 and 3)
    attention_questions: int = 300
    random_control: bool = False  # the same attention with random weights in the model
    removal: bool = False  # accuracy without visual tokens in a block of layers, and from it on (paper Fig. 5)
    block: int = 1  # layers a block


@dataclass
class Config:
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    compressor: CompressorConfig = field(default_factory=CompressorConfig)
    prefusion: PrefusionConfig = field(default_factory=PrefusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    name: str = "single"  # the experiment that a record belongs to
    seed: int = 0
    batch_size: int = 64  # questions at once outside training
    device: str = "auto"
    results: str = "results"
    save: str | None = None  # a folder for the trained model and its processor


# where a cell runs and where it writes does not change what it finds
_NOT_IDENTITY = ("device", "results", "save", "batch_size")


def resolved(config: Config | DictConfig) -> dict[str, Any]:
    """Plain containers with every interpolation resolved.

    Raises:
        omegaconf.MissingMandatoryValue: if a field that has no default was not given.
    """
    plain = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def identity(config: dict[str, Any], data: str, code: str) -> str:
    """16 hex digits that name a cell: its resolved configuration, its data and the code that ran it."""
    kept = {key: value for key, value in config.items() if key not in _NOT_IDENTITY}
    return hashlib.sha256(json.dumps([kept, data, code], sort_keys=True).encode()).hexdigest()[:16]


def register() -> None:
    """Make the classes known to Hydra, under the names that conf/ refers to."""
    store = ConfigStore.instance()
    store.store("schema", Config)
    groups: dict[str, dict[str, type]] = {
        "model": {"checkpoint": CheckpointModel, "joined": JoinedModel, "scratch": ScratchModel},
        "data": {"shapes": ShapesData, "llava_json": LlavaJsonData, "photo_grid": PhotoGridData},
        "compressor": {"": CompressorConfig},
        "prefusion": {"": PrefusionConfig},
        "train": {"": TrainConfig},
        "probe": {"": ProbeConfig},
    }
    for group, nodes in groups.items():
        for name, node in nodes.items():
            store.store(f"schema_{name}" if name else "schema", node, group=group)
