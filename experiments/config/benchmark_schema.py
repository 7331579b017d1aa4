"""The settings of the benchmarks, which run instead of a cell."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from experiments.config.fields import require_at_least, require_entries, setting


@dataclass
class BenchModel:
    """The shape of a Llama. Only `layers` of its `of_layers` layers are built.

    Raises:
        ValueError: If a value is out of range.
    """

    name: str = setting(MISSING, "name in tables")
    heads: int = setting(MISSING, "attention heads")
    head_width: int = setting(MISSING, "width of a head")
    mlp: int = setting(MISSING, "width of the MLP")
    layers: int = setting(MISSING, "layers that are built")
    of_layers: int = setting(MISSING, "layers of the whole model, to which times are scaled")

    def __post_init__(self) -> None:
        require_at_least("bench.models", self, dict.fromkeys(("heads", "head_width", "mlp", "layers", "of_layers"), 1))


@dataclass
class BenchConfig:
    """The benchmark of attention recording (experiments/benchmarks/probe_overhead).

    Raises:
        ValueError: If a value is out of range.
    """

    modes: list[str] = setting(
        MISSING, "what is compared: plain, text, all, mass, contribution, output_attentions, hooks, nnsight, bridge"
    )
    visual: list[int] = setting(MISSING, "numbers of visual tokens")
    models: list[BenchModel] = setting(MISSING, "shapes of language models")
    text: int = setting(64, "text tokens")
    vocabulary: int = setting(32000, "tokens of the vocabulary")
    dtype: str = setting("float32", "torch dtype of the weights")
    repeats: int = setting(5, "rounds; the modes take turns in each")
    threads: int = setting(0, "CPU threads; 0 for torch's own choice")
    limit_gib: float = setting(8.0, "modes whose attention matrices need more GiB than this are left out")

    def __post_init__(self) -> None:
        bounds = dict.fromkeys(("visual", "text", "vocabulary", "repeats"), 1)
        require_at_least("bench", self, bounds | {"threads": 0, "limit_gib": 0})
        require_entries("bench", self, ("visual", "models"))
        _require_dtype("bench", self.dtype)


@dataclass
class CostConfig:
    """The benchmark of LLaVA and LLaVA-Mini with random weights (experiments/benchmarks/model_cost).

    Raises:
        ValueError: If a value is out of range.
    """

    geometry: str = setting(MISSING, "an architecture of experiments/cost/architectures.py, or the folder of a LLaVA")
    sizes: list[int] = setting(MISSING, "values of C: a LLaVA-Mini with C x C tokens per frame for each")
    frames: list[int] = setting(MISSING, "numbers of frames")
    tiles: int = setting(1, "tiles per side of a frame; 2 adds four tiles to the whole frame (LLaVA takes five images)")
    prefusion: int = setting(0, "pre-fusion layers; 0 for an eighth of the language model's, as the paper's 4 of 32")
    text: int = setting(60, "text tokens of the question")
    answer: int = setting(16, "generated tokens")
    dtype: str = setting("float32", "torch dtype of the weights: float32, bfloat16 or float16")
    repeats: int = setting(5, "rounds; the models take turns in each")
    threads: int = setting(0, "CPU threads; 0 for torch's own choice")

    def __post_init__(self) -> None:
        bounds = dict.fromkeys(("sizes", "frames", "tiles", "text", "repeats"), 1)
        require_at_least("cost", self, bounds | {"answer": 2, "prefusion": 0, "threads": 0})
        require_entries("cost", self, ("frames",))
        _require_dtype("cost", self.dtype)


def _require_dtype(prefix: str, dtype: str) -> None:
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"{prefix}.dtype: unknown '{dtype}'; use float32, bfloat16 or float16")
