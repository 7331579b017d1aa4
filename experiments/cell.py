"""TODO"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.config import schema as configuration
from experiments.data.load import Data


@dataclass(frozen=True)
class Cell:
    """One configuration with one seed, and what it is known by.

    Args:
        config: The typed configuration, of the row that was asked for.
        resolved: The same as plain containers: what is hashed and recorded.
        data: The splits, of which nothing has been drawn.
        id: 16 hex digits for the configuration, the data and the code.
        row: The label of its row, where it is one of a table.
    """

    config: configuration.Config
    resolved: dict[str, Any]
    data: Data
    id: str
    row: str | None = None

    @property
    def label(self) -> str:
        """What a record is called, with its seed."""
        return _label(self.config)


def _label(config: configuration.Config) -> str:
    parts = [config.model.name]
    if config.compressor.name != "none":
        tokens = config.compressor.size**2
        parts.append(f"{tokens} token{'s' * (tokens != 1)} by {config.compressor.name}")
    if layers := config.prefusion.layers:
        inside = " inside" if config.prefusion.place == "inside" else ""
        parts.append(f"{layers} pre-fusion layer{'s' * (layers > 1)}{inside}")
    if config.reduction.name != "none":
        parts.append(_reduction_label(config.reduction))
    if config.tiles > 1:
        parts.append(f"{config.tiles} x {config.tiles} tiles")
    if config.train.steps:
        parts.append(f"{config.train.steps} steps")
    elif config.train.epochs:
        parts.append(f"{config.train.epochs} epoch{'s' * (config.train.epochs > 1)}")
    return ", ".join([*parts, f"seed {config.seed}"])


def _reduction_label(reduction: configuration.ReductionConfig) -> str:
    layers = ", ".join(map(str, reduction.layers)) + (f" of {reduction.of}" if reduction.of else "")
    keeping = "" if reduction.name == "vtw" else f" keeping {reduction.keep:.3g}"
    return f"{reduction.name}{keeping} at {layers}"
