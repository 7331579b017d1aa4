"""A cell: one configuration with one seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.config.schema import Config, ReductionConfig
from experiments.data.load import DataSplits


@dataclass(frozen=True)
class Cell:
    """One configuration with one seed, its data and its identity.

    Attributes:
        config: The typed configuration, with the settings of its table row.
        resolved: The same as plain containers: this is hashed and recorded.
        model_files: A hash of the files behind each setting that names weights, by the dotted setting.
        data: The splits. No sample has been drawn or read yet.
        id: 16 hex digits: a hash of the configuration, the data and the code.
        row: The label of its table row, None outside a table.
    """

    config: Config
    resolved: dict[str, Any]
    model_files: dict[str, str]
    data: DataSplits
    id: str
    row: str | None = None

    @property
    def label(self) -> str:
        """The name of its record: model, what sets it apart, and seed."""
        return _label(self.config)


def _label(config: Config) -> str:
    parts = [config.model.name]
    if config.compressor.name != "none":
        tokens = config.compressor.size**2
        parts.append(f"{tokens} token{'s' * (tokens != 1)} by {config.compressor.name}")
    if layers := config.prefusion.layers:
        inside = " inside" if config.prefusion.location == "inside" else ""
        parts.append(f"{layers} pre-fusion layer{'s' * (layers > 1)}{inside}")
    if config.reduction.name != "none":
        parts.append(_reduction_label(config.reduction))
    if config.tiles > 1:
        parts.append(f"{config.tiles} x {config.tiles} tiles")
    at_most = "at most " if config.train.until == "plateau" else ""
    if config.train.max_steps:
        parts.append(f"{at_most}{config.train.max_steps} steps")
    elif config.train.num_train_epochs:
        parts.append(f"{at_most}{config.train.num_train_epochs} epoch{'s' * (config.train.num_train_epochs > 1)}")
    return ", ".join([*parts, f"seed {config.seed}"])


def _reduction_label(reduction: ReductionConfig) -> str:
    layers = ", ".join(map(str, reduction.layers)) + (
        f" of {reduction.reference_depth}" if reduction.reference_depth else ""
    )
    keeping = "" if reduction.name == "vtw" else f" keeping {reduction.keep:.3g}"
    return f"{reduction.name}{keeping} at {layers}"
