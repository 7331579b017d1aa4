"""The typed configuration of what is measured of a machine in place of a cell: what recording costs, what models cost."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING


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
    """LLaVA and the LLaVA-Minis on it that experiments/cost/measure.py measures, all with random weights.

    Raises:
        ValueError: if a field is out of its range.
    """

    geometry: str = MISSING  # one of experiments/cost/geometries.py, or the folder of a saved LLaVA
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
