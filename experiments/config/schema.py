"""The typed configuration of one cell. Hydra refuses what does not fit these classes before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

TRAIN_CHOICES = {
    "trainable": ("all", "projector"),
    "optimizer": ("adamw", "muon"),
    "schedule": ("cosine", "linear", "constant", "constant_with_warmup"),
}


REDUCTIONS = ("none", "fastv", "vtw", "pyramid_drop")


PREFUSION_PLACES = ("outside", "inside")


@dataclass
class ModelConfig:
    """Where a LLaVA comes from. `name` is what tables call it."""

    name: str = MISSING
    dtype: str = "float32"  # any torch dtype: float32, bfloat16, float16
    attention: str = "sdpa"  # sdpa, eager, flash_attention_2
    # patches a side of the vision tower, for tables whose sizes scale with it; a joined model scales pictures to have them
    grid: int | None = None


@dataclass
class CheckpointModel(ModelConfig):
    """A saved LLaVA or LLaVA-Mini: a folder, a name on the model hub, or `asset:NAME` for one that ships with the
    project."""

    path: str = MISSING


@dataclass
class JoinedModel(ModelConfig):
    """A LLaVA made of a vision directory and a language directory, with a projector drawn from the seed."""

    vision: str = MISSING
    language: str = MISSING
    vision_layer: int = -2
    adapter: str | None = None  # the folder of one that training with `train.lora` left


@dataclass
class TrainConfig:
    """What transformers' Trainer is given. `steps` or `epochs` of 0 trains nothing.

    Raises:
        ValueError: if a field is out of its range, or does not go with another.
    """

    steps: int = 0
    epochs: int = 0  # counted instead where steps is 0
    trainable: str = "all"  # all: all but the vision tower; projector: the projector alone
    train_vision: bool = False  # the vision tower too
    lora: int = 0  # rank of adapters in the language model, which itself then stays as it is; 0 for none
    optimizer: str = "adamw"  # adamw, or muon (experiments/training/optimizers.py)
    batch_size: int = 32  # conversations a step, over all processes and accumulation steps
    micro_batch: int = 0  # conversations a process takes at once, gradients adding up over a step; 0 for all of its own
    group_by_length: bool = False  # those taken at once are of like length
    learning_rate: float = 1e-3
    projector_learning_rate: float | None = None  # where it has one of its own
    prefusion_learning_rate: float | None = None  # likewise: what has learned already bears less than what is new
    warmup: float = 20  # steps; below 1 a share of all
    schedule: str = "cosine"
    weight_decay: float = 0.01
    adam_beta2: float = 0.98
    max_grad_norm: float = 1.0  # longer gradients are cut to it; 0 cuts none
    bf16: bool = False
    save_every: int = 100  # steps between checkpoints that a cut run resumes from

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "save_every": 1} | dict.fromkeys(
            ("steps", "epochs", "lora", "micro_batch", "warmup", "weight_decay", "adam_beta2", "max_grad_norm"), 0
        )
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise ValueError(f"train.{name}: must be at least {bound}, found {getattr(self, name)}")
        own_rates = ("projector_learning_rate", "prefusion_learning_rate")
        for name in ("learning_rate", *own_rates):
            rate = getattr(self, name)
            if rate is not None and not rate > 0:
                raise ValueError(f"train.{name}: must be more than 0, found {rate}")
            if name in own_rates and rate is not None and self.optimizer != "adamw":
                raise ValueError(f"train.{name}: only adamw knows one; leave it out or use adamw")
        if self.adam_beta2 >= 1:
            raise ValueError(f"train.adam_beta2: must be below 1, found {self.adam_beta2}")
        for name, choices in TRAIN_CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"train.{name}: no '{getattr(self, name)}'; use {' or '.join(choices)}")
        if self.trainable == "projector" and (self.lora or self.train_vision):
            raise ValueError("train.trainable: 'projector' trains the projector alone; leave out lora and train_vision")
        if self.lora and self.train_vision:
            raise ValueError("train.lora: adapters leave the vision tower as it is; leave out train_vision")

    @property
    def trains(self) -> bool:
        return self.steps > 0 or self.epochs > 0


@dataclass
class ScratchModel(ModelConfig):
    """A small LLaVA with nothing learned; see experiments/models/scratch.py."""

    patch: int = 8  # pixels a side
    width: int = 128
    layers: int = 6
    vocabulary: int = 512  # at most
    tower: TrainConfig = field(
        default_factory=TrainConfig
    )  # first it learns to see (experiments/training/vision_pretraining.py),
    describe: TrainConfig = field(default_factory=TrainConfig)  # then to say what is where; the cell's training is last


@dataclass
class CompressorConfig:
    """LLaVA-Mini's compressor (paper section 4.1). `none` hands all patches to the language model."""

    name: str = "none"
    size: int = 1  # C: the language model sees C x C tokens; 0 for none
    # where paper and released code differ, the code's (llava_mini/configuration.py)
    before_projection: bool = True
    attention: str = "multi_head"  # of the compressor `query`: multi_head or bare
    positions: str = "query_grid"  # of the compressor `query`: query_grid or own_grid


@dataclass
class PrefusionConfig:
    """LLaVA-Mini's modality pre-fusion (paper section 4.1). 0 layers and no compressor is plain LLaVA.

    Raises:
        ValueError: if a field is out of its range.
    """

    layers: int = 0
    init: str = "language_model"  # copy its first layers; identity: a copy that gives zero at first; or fresh
    visual_tokens: bool = True  # they go through it too, as in the released code; not in the paper's equation 3
    place: str = "outside"  # ahead of the language model, or inside: its own first layers see the patches (Table 12)

    def __post_init__(self) -> None:
        if self.place not in PREFUSION_PLACES:
            raise ValueError(f"prefusion.place: no '{self.place}'; use {' or '.join(PREFUSION_PLACES)}")
        if self.place == "inside" and self.layers < 1:
            raise ValueError(f"prefusion.layers: must be at least 1 inside the language model, found {self.layers}")


@dataclass
class ReductionConfig:
    """Visual tokens dropped inside the language model while it answers (experiments/models/token_reduction.py). Layers count from 0.

    Raises:
        ValueError: if a field is out of its range, or does not go with the method.
    """

    name: str = "none"  # or fastv, vtw, pyramid_drop
    layers: list[int] = field(default_factory=list)  # the first that run on fewer tokens: fastv and vtw have one
    of: int = 0  # layers of the model that `layers` are of, and are scaled from; 0 for the model at hand
    keep: float = 0.0  # share of the tokens that stays; of pyramid_drop's, each time

    def __post_init__(self) -> None:
        if self.name not in REDUCTIONS:
            raise ValueError(f"reduction.name: no '{self.name}'; use {', '.join(REDUCTIONS)}")
        if self.name == "none" and self.layers:
            raise ValueError("reduction.layers: 'none' drops nothing; leave them out, or choose a method")
        if self.name in ("fastv", "vtw") and len(self.layers) != 1:
            raise ValueError(f"reduction.layers: {self.name} drops tokens once; name one layer, found {self.layers}")
        if self.name == "pyramid_drop" and not self.layers:
            raise ValueError("reduction.layers: pyramid_drop needs at least one layer to drop tokens at")
        if self.of < 0:
            raise ValueError(f"reduction.of: must be at least 0, found {self.of}")
        if self.name in ("none", "vtw") and self.keep:
            raise ValueError(f"reduction.keep: {self.name} has no share to keep; leave it out, found {self.keep}")
        if not 0 <= self.keep < 1:
            raise ValueError(f"reduction.keep: a share from 0 to below 1, found {self.keep}")


@dataclass
class BudgetConfig:
    """Has the settings of a method chosen for it: the dearest within a share of LLaVA's FLOPs (experiments/sweeps/budget.py)."""

    method: str = "none"  # a compressor, without pre-fusion, or a reduction
    share: float = 1.0
    text: int = 40  # tokens of the prompt that are no picture


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
class ShapesVideoData(DataConfig):
    """Clips of shapes, one a second (experiments/data/shapes_video.py)."""

    frames: int = 0  # of each clip, spread evenly; 0 for one a second


@dataclass
class LlavaJsonData(DataConfig):
    """LLaVA-format JSON. Without `test_path` all of `path` is the test split and there is no training split."""

    path: str = MISSING
    images: str = MISSING  # the folder that images and videos are in
    test_path: str | None = None
    frames: int = 8  # of each video, spread evenly (8: the released training code)


@dataclass
class PhotosData(DataConfig):
    """Photographs alone and in grids, and scenes of shapes. `photos` holds train.npz, test.npz and classes.json (README,
    "Your own data")."""

    photos: str = MISSING
    parts: list[str] = field(default_factory=lambda: ["one", "2x2", "3x3", "shapes"])  # in turn
    side: int = 16  # of a picture, in patches
    patch: int = 14  # pixels a side
    captions: bool = False  # trained on descriptions alone, as in LLaVA's first stage


@dataclass
class ProbeConfig:
    """What is measured on the test questions beyond accuracy."""

    controls: bool = False  # accuracy with a blank and with another question's picture
    attention: bool = False  # mass and entropy between token groups by layer (paper Figs. 2 and 3)
    attention_questions: int = 300
    random_control: bool = False  # the same attention with random weights in the model
    removal: bool = False  # accuracy without visual tokens in a block of layers, and from it on (paper Fig. 5)
    block: int = 1  # layers a block
    knockout: bool = False  # accuracy with text cut off from visual tokens in windows of layers
    knockout_width: int = 1  # layers a window
    readout: bool = False  # whether the answer can be read off the question's states, by layer
    lens: bool = False  # the right first token's rank and log-probability where it is predicted, by layer


@dataclass
class Config:
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    compressor: CompressorConfig = field(default_factory=CompressorConfig)
    prefusion: PrefusionConfig = field(default_factory=PrefusionConfig)
    reduction: ReductionConfig = field(default_factory=ReductionConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    tiles: int = 1  # a picture is cut into tiles x tiles and also seen whole (paper, LLaVA-Mini-HD: 2)
    train: TrainConfig = field(default_factory=TrainConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    keep_features: bool = (
        False  # of the frozen tower, in bf16, for all cells that see them (experiments/models/feature_cache.py)
    )
    bench: BenchConfig | None = None  # measured instead of a cell
    cost: CostConfig | None = None  # measured instead of a cell
    name: str = "single"  # the experiment that a record belongs to
    rows: list[Any] = field(default_factory=list)  # of the experiment's table (experiments/config/rows.py)
    row: int | None = None  # the one to run
    seed: int = 0
    batch_size: int = 64  # questions at once outside training
    device: str = "auto"
    threads: int = 1  # of the CPU; a sum's last bits depend on how many share it, so one is what every launcher gives
    results: str = "results"
    retry_failed: bool = False  # run cells again that failed before: --retry-failed
    save: str | None = None  # a folder for the trained model and its processor

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads: must be at least 1, found {self.threads}")
        if self.keep_features and self.train.train_vision:
            raise ValueError("keep_features: train.train_vision changes what the tower says; leave out one of them")


MODELS: dict[str, type] = {"checkpoint": CheckpointModel, "joined": JoinedModel, "scratch": ScratchModel}


DATA: dict[str, type] = {
    "shapes": ShapesData,
    "shapes_video": ShapesVideoData,
    "llava_json": LlavaJsonData,
    "photos": PhotosData,
}


@dataclass
class BenchModel:
    """A Llama's shape, of which only some layers are built."""

    name: str = MISSING
    heads: int = MISSING
    head_width: int = MISSING
    mlp: int = MISSING
    layers: int = MISSING
    of_layers: int = MISSING


@dataclass
class BenchConfig:
    """What experiments/bench measures."""

    modes: list[str] = MISSING
    visual: list[int] = MISSING
    models: list[BenchModel] = MISSING
    text: int = 64
    vocabulary: int = 32000
    dtype: str = "float32"
    repeats: int = 5
    threads: int = 0  # 0 leaves torch's own choice
    limit_gib: float = 8.0  # modes that hold more than this in matrices of all queries and keys do not run


@dataclass
class CostConfig:
    """LLaVA and the LLaVA-Minis on it that experiments/benchmarks/model_cost/run.py measures, all with random weights.

    Raises:
        ValueError: if a field is out of its range.
    """

    geometry: str = MISSING  # one of experiments/cost/architectures.py, or the folder of a saved LLaVA
    sizes: list[int] = MISSING  # C: a LLaVA-Mini for each, which gives the language model C x C tokens a frame
    frames: list[int] = MISSING
    tiles: int = 1  # a side: 2 for frames of four tiles and the whole, which LLaVA takes as five pictures
    prefusion: int = 0  # layers; 0 for an eighth of the language model's, as the paper's 4 of 32
    text: int = 60  # tokens of the question
    answer: int = 16  # tokens generated
    dtype: str = "float32"
    repeats: int = 5
    threads: int = 0  # 0 leaves torch's own choice

    def __post_init__(self) -> None:
        least = {
            "sizes": 1,
            "frames": 1,
            "tiles": 1,
            "text": 1,
            "answer": 2,
            "repeats": 1,
            "prefusion": 0,
            "threads": 0,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            found = value if isinstance(value, list) else [] if value == MISSING else [value]
            for number in found:
                if number < bound:
                    raise ValueError(f"cost.{name}: must be at least {bound}, found {number}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"cost.dtype: no '{self.dtype}'; use float32, bfloat16 or float16")
