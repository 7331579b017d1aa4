"""The settings of one cell: name, type, default and meaning of each.

Hydra refuses a value of the wrong type before anything runs. `python -m experiments.run --help` and docs/settings.md are
made from the help texts here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from experiments.config.benchmark_schema import BenchConfig, CostConfig
from experiments.config.data_schema import DataConfig
from experiments.config.fields import group, require_at_least, setting

PLATEAU_SCHEDULE = "reduce_lr_on_plateau"
TRAIN_CHOICES = {
    "until": ("steps", "plateau"),
    "trainable": ("all", "projector"),
    "optim": ("adamw", "muon"),
    "lr_scheduler_type": ("cosine", "linear", "constant", "constant_with_warmup", PLATEAU_SCHEDULE),
}
REDUCTIONS = ("none", "fastv", "vtw", "pyramid_drop", "dart", "sparsevlm", "random_drop")
STAGED_REDUCTIONS = ("pyramid_drop", "sparsevlm")  # drop tokens at several layers
PREFUSION_LOCATIONS = ("outside", "inside")
SEED_LIMIT = 2**32  # of numpy's global generator
INTERVAL_PROBES = ("attention", "removal", "onset", "knockout")  # have an interval over test questions


@dataclass
class ModelConfig:
    """The LLaVA that a cell starts from."""

    name: str = setting(MISSING, "name of the model in tables")
    dtype: str = setting("float32", "torch dtype of the weights: float32, bfloat16 or float16")
    attention: str = setting("sdpa", "attention implementation: sdpa, eager or flash_attention_2")
    grid: int | None = setting(
        None, "patches per side of the vision tower; tables scale sizes by it, and a joined model resizes images to it"
    )


@dataclass
class CheckpointModel(ModelConfig):
    """A saved LLaVA or LLaVA-Mini."""

    path: str = setting(MISSING, "folder, model hub name, or asset:NAME for a model that ships with the project")


@dataclass
class JoinedModel(ModelConfig):
    """A LLaVA made of a vision model and a language model, with a projector initialised from the seed."""

    vision: str = setting(MISSING, "folder or hub name of the vision model")
    language: str = setting(MISSING, "folder or hub name of the language model")
    vision_layer: int = setting(-2, "hidden states of the vision tower that the projector reads; -2 is the second last")
    adapter: str | None = setting(None, "folder of an adapter that training with train.lora_rank saved")


@dataclass
class TrainConfig:
    """Training by transformers' Trainer. Settings that are Trainer's own have its names.

    Raises:
        ValueError: If a value is out of range, or two settings exclude each other.
    """

    max_steps: int = setting(0, "optimizer steps; with 0, num_train_epochs counts; with both 0 nothing is trained")
    num_train_epochs: int = setting(0, "epochs, if max_steps is 0")
    until: str = setting(
        "steps",
        "steps: train for max_steps or num_train_epochs; plateau: they are a maximum, and training ends once validation "
        "loss has stopped falling (docs/training.md)",
    )
    eval_steps: int = setting(0, "steps between two measurements of the validation split; 0 for none")
    patience: int = setting(
        3, "measurements in a row without improvement that make a plateau; the learning rate is lowered there"
    )
    min_improvement: float = setting(
        0.005, "share of the lowest validation loss so far by which a measurement must be below it to be an improvement"
    )
    trainable: str = setting("all", "all: everything but the vision tower; projector: the projector alone")
    train_vision: bool = setting(False, "also train the vision tower")
    lora_rank: int = setting(0, "rank of LoRA adapters in the language model, whose weights stay fixed; 0 for none")
    lora_init: str | None = setting(
        None,
        "folder of a saved adapter of the same rank from which training starts; none for adapters that change nothing",
    )
    optim: str = setting("adamw", "adamw, or muon (experiments/training/optimizers.py)")
    batch_size: int = setting(32, "conversations per optimizer step, over all processes and accumulation steps")
    per_device_train_batch_size: int = setting(
        0, "conversations per forward pass of a process; gradients accumulate over a step; 0 for all of its own"
    )
    group_by_length: bool = setting(False, "sort the conversations of each step by length, for less padding")
    learning_rate: float = setting(1e-3, "peak learning rate")
    projector_learning_rate: float | None = setting(None, "learning rate of the projector, if another")
    prefusion_learning_rate: float | None = setting(
        None, "learning rate of the pre-fusion layers, if another: pretrained layers tolerate less than new ones"
    )
    warmup_steps: float = setting(20, "warm-up steps; below 1 a share of all steps")
    lr_scheduler_type: str = setting(
        "cosine",
        f"cosine, linear, constant, constant_with_warmup, or {PLATEAU_SCHEDULE}, which train.until=plateau needs",
    )
    weight_decay: float = setting(0.01, "weight decay")
    adam_beta2: float = setting(0.98, "second moment decay of AdamW")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm; 0 for no clipping")
    bf16: bool = setting(
        False, "train in bfloat16 autocast; trained weights are in float32 meanwhile, whatever model.dtype is"
    )
    torch_compile: bool = setting(
        False,
        "compile the language model's layers: a minute at the start, and shorter steps after it (docs/training.md)",
    )
    save_steps: int = setting(100, "steps between checkpoints, from which an interrupted run resumes")

    def __post_init__(self) -> None:
        counts = ("max_steps", "num_train_epochs", "lora_rank", "per_device_train_batch_size", "warmup_steps")
        others = ("eval_steps", "min_improvement", "weight_decay", "adam_beta2", "max_grad_norm")
        ones = ("batch_size", "save_steps", "patience")
        require_at_least("train", self, dict.fromkeys((*counts, *others), 0) | dict.fromkeys(ones, 1))
        own_rates = ("projector_learning_rate", "prefusion_learning_rate")
        for name in ("learning_rate", *own_rates):
            rate = getattr(self, name)
            if rate is not None and not rate > 0:
                raise ValueError(f"train.{name}: must be more than 0, found {rate}")
            if name in own_rates and rate is not None and self.optim != "adamw":
                raise ValueError(f"train.{name}: train.optim={self.optim} has one rate for all; leave it out")
        for name in ("adam_beta2", "min_improvement"):
            if getattr(self, name) >= 1:
                raise ValueError(f"train.{name}: must be below 1, found {getattr(self, name)}")
        for name, choices in TRAIN_CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"train.{name}: unknown '{getattr(self, name)}'; use {' or '.join(choices)}")
        if self.until == "plateau" and not self.eval_steps:
            raise ValueError("train.eval_steps: until=plateau needs the steps between two measurements, found 0")
        if (self.until == "plateau") != (self.lr_scheduler_type == PLATEAU_SCHEDULE):
            raise ValueError(
                f"train.lr_scheduler_type: until=plateau and {PLATEAU_SCHEDULE} go together, because other schedules end "
                f"at a known step; found until={self.until} and {self.lr_scheduler_type}"
            )
        if self.until == "plateau" and not self.trains:
            raise ValueError(
                "train.max_steps: until=plateau needs a maximum, and 0 steps train nothing; set it or train.num_train_epochs"
            )
        if self.trainable == "projector" and (self.lora_rank or self.train_vision):
            raise ValueError("train.trainable: 'projector' trains nothing else; leave out lora_rank and train_vision")
        if self.lora_init is not None and not self.lora_rank:
            raise ValueError(
                f"train.lora_init: '{self.lora_init}' needs train.lora_rank, the rank of its adapters, found 0"
            )
        if self.lora_rank and self.train_vision:
            raise ValueError("train.lora_rank: adapters keep the vision tower fixed; leave out train_vision")

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return self.max_steps > 0 or self.num_train_epochs > 0


@dataclass
class ScratchModel(ModelConfig):
    """A small LLaVA with random weights, pretrained in two stages (experiments/models/scratch.py)."""

    patch: int = setting(8, "pixels per side of a patch")
    width: int = setting(128, "width of the hidden states")
    layers: int = setting(6, "layers of the language model")
    vocabulary: int = setting(512, "tokens of the vocabulary, at most")
    vision_pretraining: TrainConfig = group(TrainConfig, "first stage: the vision tower learns to name shapes")
    caption_pretraining: TrainConfig = group(TrainConfig, "second stage: the model learns to describe images")

    def __post_init__(self) -> None:
        if self.dtype != "float32":
            raise ValueError(f"model.dtype: a model from scratch is pretrained in float32, found '{self.dtype}'")
        for name in ("vision_pretraining", "caption_pretraining"):
            stage = getattr(self, name)
            if isinstance(stage, TrainConfig) and stage.eval_steps:
                raise ValueError(
                    f"model.{name}.eval_steps: the validation split has questions, which this stage does not train; found "
                    f"{stage.eval_steps}, use 0"
                )
        if isinstance(self.vision_pretraining, TrainConfig) and self.vision_pretraining.torch_compile:
            raise ValueError(
                "model.vision_pretraining.torch_compile: this stage trains the vision tower, and the layers that are compiled "
                "are the language model's; found true, use false"
            )


@dataclass
class CompressorConfig:
    """LLaVA-Mini's compression module (paper section 4.1). Where paper and released code differ, defaults are the code's.

    Raises:
        ValueError: If a value is out of range.
    """

    name: str = setting("none", "compressor of the visual tokens; none gives all patches to the language model")
    size: int = setting(1, "C: the language model gets C x C visual tokens; 0 for none")
    before_projection: bool = setting(True, "compress the vision tower's features, before the projector")
    attention: str = setting("multi_head", "attention of compressor query: multi_head or bare")
    positions: str = setting("query_grid", "positions of compressor query: query_grid or own_grid")

    def __post_init__(self) -> None:
        require_at_least("compressor", self, {"size": 0})


@dataclass
class PrefusionConfig:
    """LLaVA-Mini's modality pre-fusion (paper section 4.1). 0 layers and no compressor is plain LLaVA.

    Raises:
        ValueError: If a value is out of range.
    """

    layers: int = setting(0, "pre-fusion layers")
    init: str = setting(
        "language_model", "initial weights: language_model (its first layers), identity (adds zero at first) or fresh"
    )
    visual_tokens: bool = setting(True, "compressed tokens pass through pre-fusion too (code; not in equation 3)")
    location: str = setting("outside", "outside: before the language model; inside: its own first layers (Table 12)")

    def __post_init__(self) -> None:
        if self.location not in PREFUSION_LOCATIONS:
            use = " or ".join(PREFUSION_LOCATIONS)
            raise ValueError(f"prefusion.location: unknown '{self.location}'; use {use}")
        if self.location == "inside" and self.layers < 1:
            raise ValueError(f"prefusion.layers: must be at least 1 inside the language model, found {self.layers}")
        require_at_least("prefusion", self, {"layers": 0})


@dataclass
class ReductionConfig:
    """A method that drops visual tokens inside the language model while it answers (experiments/models/token_reduction.py).

    Raises:
        ValueError: If a value is out of range, or the method has no such setting.
    """

    name: str = setting("none", "none, fastv, vtw, pyramid_drop, dart, sparsevlm or random_drop")
    layers: list[int] = setting(
        [], "first layers that run on fewer tokens, counted from 0; all methods but pyramid_drop and sparsevlm have one"
    )
    reference_depth: int = setting(
        0,
        "depth of the model that `layers` was published for; layers are scaled from it to the model's; 0 for as given",
    )
    keep: float = setting(
        0.0, "share of the visual tokens that stays; for pyramid_drop and sparsevlm the share at each of their layers"
    )

    def __post_init__(self) -> None:
        if self.name not in REDUCTIONS:
            raise ValueError(f"reduction.name: unknown '{self.name}'; use {', '.join(REDUCTIONS)}")
        if self.name == "none" and self.layers:
            raise ValueError(f"reduction.layers: method 'none' drops nothing; leave out {self.layers} or name a method")
        if self.name not in ("none", *STAGED_REDUCTIONS) and len(self.layers) != 1:
            raise ValueError(f"reduction.layers: {self.name} drops tokens once; name one layer, found {self.layers}")
        if self.name in STAGED_REDUCTIONS and not self.layers:
            raise ValueError(f"reduction.layers: {self.name} needs at least one layer, found []")
        require_at_least("reduction", self, {"reference_depth": 0})
        if self.name in ("none", "vtw") and self.keep:
            raise ValueError(f"reduction.keep: method '{self.name}' keeps no share; leave it out, found {self.keep}")
        if not 0 <= self.keep < 1:
            raise ValueError(f"reduction.keep: must be at least 0 and below 1, found {self.keep}")


@dataclass
class BudgetConfig:
    """A FLOPs budget: the method's most costly setting within it is used (experiments/sweeps/budget.py)."""

    method: str = setting("none", "a compressor (then without pre-fusion) or a reduction; none for no budget")
    share: float = setting(1.0, "budget as a share of LLaVA's FLOPs")
    text_tokens: int = setting(40, "text tokens of the prompt that FLOPs are counted for")

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"budget.share: must be above 0 and at most 1, found {self.share}")
        require_at_least("budget", self, {"text_tokens": 1})


@dataclass
class ProbeConfig:
    """The analyses that a cell runs on the test questions, beyond accuracy."""

    controls: bool = setting(False, "blind controls: accuracy with a blank image and with another question's image")
    attention: bool = setting(False, "attention mass and entropy between token groups, by layer (Figures 2 and 3)")
    attention_questions: int = setting(300, "questions that attention is recorded on")
    random_control: bool = setting(False, "with attention: the same in a model with random weights")
    contribution: bool = setting(
        False, "with attention: how much each token group adds to the attention's output, by layer and head"
    )
    sinks: bool = setting(False, "with attention: visual attention sinks by layer, by attention and by value norm")
    leave_out_sinks: bool = setting(
        False, "with attention: mass, entropy and contribution count no visual sink (one more pass finds them)"
    )
    removal: bool = setting(False, "accuracy without visual tokens in a block of layers, and from it on (Figure 5)")
    removal_block_size: int = setting(1, "layers of a block, also of the onset's steps")
    onset: bool = setting(False, "accuracy without visual tokens in the first layers, for each number of them")
    knockout: bool = setting(False, "accuracy with attention from text to vision blocked in windows of layers")
    knockout_width: int = setting(1, "layers of a window")
    readout: bool = setting(
        False, "accuracy of a linear probe for the answer on the question's hidden states, by layer"
    )
    view_questions: int = setting(0, "test questions on the attention page, which is written beside the records")
    lens: bool = setting(
        False,
        "logit lens: rank and log-probability of the answer's first token, by layer; with data=shapes also which words "
        "patches get, by it and by contextual embeddings",
    )
    swaps: bool = setting(
        False, "layer at which text reads each property, by swaps of minimal pairs; for data shapes and photos"
    )
    swap_pairs: int = setting(100, "minimal pairs of each property")

    def __post_init__(self) -> None:
        require_at_least("probe", self, {"swap_pairs": 10, "attention_questions": 2, "view_questions": 0})
        if not self.attention:  # they would be left out without a word
            for name in ("random_control", "contribution", "sinks", "leave_out_sinks"):
                if getattr(self, name):
                    raise ValueError(
                        f"probe.{name}: is measured with attention; set probe.attention=true, or {name}=false"
                    )


@dataclass
class Config:
    """All settings of one cell, or of one benchmark."""

    model: ModelConfig = setting(MISSING, "the LLaVA that the cell starts from")
    data: DataConfig = setting(MISSING, "training and test data")
    compressor: CompressorConfig = group(CompressorConfig, "compression of the visual tokens")
    prefusion: PrefusionConfig = group(PrefusionConfig, "pre-fusion layers")
    reduction: ReductionConfig = group(ReductionConfig, "visual tokens dropped inside the language model")
    budget: BudgetConfig = group(BudgetConfig, "FLOPs budget")
    tiles: int = setting(1, "tiles per side of an image, which is encoded as a whole too (LLaVA-Mini-HD: 2)")
    train: TrainConfig = group(TrainConfig, "training")
    probe: ProbeConfig = group(ProbeConfig, "analyses")
    keep_features: bool = setting(False, "cache the frozen vision tower's features on disk, in bf16, for all cells")
    bench: BenchConfig | None = setting(None, "benchmark of attention recording, run instead of a cell")
    cost: CostConfig | None = setting(None, "benchmark of models, run instead of a cell")
    name: str = setting("single", "experiment that the record belongs to")
    rows: list[Any] = setting([], "rows of the experiment's table (experiments/config/rows.py)")
    row: int | None = setting(None, "the row to run, counted from 0")
    seed: int = setting(0, "seed of the weights and of the order of training")
    batch_size: int = setting(64, "questions per forward pass outside training")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    threads: int = setting(1, "CPU threads; 1 gives the same last bits under every launcher")
    results: str = setting("results", "folder of the records")
    retry_failed: bool = setting(False, "run failed cells again; the flag --retry-failed sets it")
    save: str | None = setting(None, "folder for the trained model and its processor")

    def __post_init__(self) -> None:
        require_at_least("", self, {"threads": 1, "tiles": 1, "seed": 0, "batch_size": 1})
        if self.seed >= SEED_LIMIT:
            raise ValueError(f"seed: must be below {SEED_LIMIT}, found {self.seed}")
        if (
            isinstance(self.model, ModelConfig)
            and self.model.dtype in ("float16", "half")  # two names of one type in torch
            and self.train.bf16
            and self.train.trains
        ):
            raise ValueError(
                "train.bf16: bfloat16 autocast cannot train a model whose model.dtype is float16; set model.dtype=bfloat16 "
                "or float32, or train.bf16=false"
            )
        if self.train.eval_steps and isinstance(self.data, DataConfig) and not self.data.validation_samples:
            raise ValueError(
                f"data.validation_samples: train.eval_steps={self.train.eval_steps} measures the validation split, which "
                "has 0 samples; set how many"
            )
        if isinstance(self.data, DataConfig) and self.data.test_samples == 1:
            for name in INTERVAL_PROBES:
                if getattr(self.probe, name):
                    raise ValueError(
                        f"data.test_samples: the interval of probe.{name} needs at least 2 questions, found 1; use 0 for "
                        "all of them, or 2"
                    )
        if self.keep_features and self.train.train_vision:
            raise ValueError("keep_features: train.train_vision changes the features; leave out one of the two")


MODELS: dict[str, type] = {"checkpoint": CheckpointModel, "joined": JoinedModel, "scratch": ScratchModel}
