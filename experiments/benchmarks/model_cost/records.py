"""Records of measured costs: their contents, and how a folder of them is read."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

CostRecord: TypeAlias = Mapping[str, Any]
CostRow: TypeAlias = Mapping[str, Any]

COMPONENTS = {
    "tower": "vision tower",
    "projector": "projector",
    "compressor": "compressor",
    "prefusion": "pre-fusion",
    "prefill": "language model",
    "head": "head",
}
"""The components that run until the first token: their keys in a record, and their names in tables."""

_ROW_KEYS = (
    "model",
    "size",
    "frames",
    "visual_tokens",
    "prefusion_layers",
    "flops",
    "seconds",
    "memory",
    "cache_estimate",
)
_SETTING_KEYS = ("geometry", "dtype", "tiles", "text")


@dataclass(frozen=True)
class TimeRatio:
    """The time of one run over that of another: the ratio of medians, and the lowest and highest of a single round."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"


@dataclass(frozen=True, order=True)
class CostSetting:
    """Settings that must be equal for costs to be comparable.

    Args:
        geometry: The architecture, as in `cost.geometry`.
        pixels: Side of an image, over all of its tiles.
        tiles: Tiles along each side of an image.
        text: Text tokens of the question.
        layers: Pre-fusion layers.
        dtype: The dtype of weights and activations.
        machine: The name of the device.
    """

    geometry: str
    pixels: int
    tiles: int
    text: int
    layers: int
    dtype: str
    machine: str

    @classmethod
    def of(cls, record: CostRecord) -> CostSetting:
        """Return the setting of a record."""
        values = {name: record["cost"][name] for name in _SETTING_KEYS}
        layers = max(row["prefusion_layers"] for row in record["rows"])
        return cls(**values, layers=layers, pixels=record["pixels"], machine=record["machine"])

    def __str__(self) -> str:
        return f"{self.geometry}, {self.pixels} px, {self.dtype}, {self.machine}"


@dataclass(frozen=True)
class MeasuredModel:
    """A row of a record: one model over one number of frames.

    Args:
        row: The row.
        ratio: LLaVA's time to the first token over that of this model. None if either did not run.
    """

    row: CostRow
    ratio: TimeRatio | None

    @property
    def size(self) -> int:
        """C of the compressor; 0 for LLaVA."""
        return self.row["size"]

    @property
    def frames(self) -> int:
        """Number of frames."""
        return self.row["frames"]

    @property
    def name(self) -> str:
        """Name of the model in tables."""
        return self.row["model"].removeprefix("LLaVA-Mini, ")

    @property
    def seconds(self) -> dict[str, float] | None:
        """Median seconds of each of `COMPONENTS`, "first token" and "decode"; None if the model did not run."""
        times = self.row["seconds"]
        return times and {name: statistics.median(rounds) for name, rounds in times.items()}

    @property
    def flops(self) -> float:
        """FLOPs until the first token."""
        return sum(self.row["flops"][part] for part in COMPONENTS)

    @property
    def peak(self) -> int | None:
        """Peak bytes on the model's device; None if the model did not run."""
        memory = self.row["memory"]
        return memory and memory.get("allocated", memory["resident"])


def time_ratios(record: CostRecord, name: str) -> dict[tuple[str, int], TimeRatio | None]:
    """Return LLaVA's time over that of each model.

    Args:
        record: The record.
        name: A key of `seconds`.

    Returns:
        The ratio by model and frames; None if LLaVA or the model did not run.
    """
    llava = {row["frames"]: row["seconds"] for row in record["rows"] if row["model"] == "LLaVA"}
    ratios: dict[tuple[str, int], TimeRatio | None] = {}
    for row in record["rows"]:
        seconds, llava_seconds = row["seconds"], llava[row["frames"]]
        key = row["model"], row["frames"]
        ratios[key] = None
        if seconds is not None and llava_seconds is not None:
            rounds = [a / b for a, b in zip(llava_seconds[name], seconds[name], strict=True)]
            medians = statistics.median(llava_seconds[name]) / statistics.median(seconds[name])
            ratios[key] = TimeRatio(medians, min(rounds), max(rounds))
    return ratios


def group_by_setting(records: Sequence[CostRecord]) -> dict[CostSetting, list[MeasuredModel]]:
    """Return all measured models by setting, LLaVA first, then by C and by frames.

    Of two measurements in one setting the newer counts. A ratio always compares two runs of one record, which took turns.
    """
    settings: dict[CostSetting, dict[tuple[int, int], MeasuredModel]] = {}
    for record in sorted(records, key=lambda record: record["provenance"]["started"]):
        rows = settings.setdefault(CostSetting.of(record), {})
        ratios = time_ratios(record, "first token")
        for row in record["rows"]:
            rows[row["size"], row["frames"]] = MeasuredModel(row, ratios[row["model"], row["frames"]])
    return {setting: [rows[key] for key in sorted(rows)] for setting, rows in sorted(settings.items())}


def load_cost_records(folder: Path) -> tuple[list[CostRecord], list[str]]:
    """Read every `*.json` of a folder.

    Returns:
        The records, and a line for each file that is no complete record of costs.

    Raises:
        FileNotFoundError: If the folder holds no such file.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds no records (*.json); run `python -m experiments.run experiment=cost` first or name another "
            "folder with --results"
        )
    records, errors = [], []
    for path in paths:
        try:
            records.append(read_cost_record(path))
        except (OSError, ValueError) as error:
            errors.append(f"{path.name}: {error}")
    return records, errors


def read_cost_record(path: Path) -> CostRecord:
    """Read one record of costs.

    Raises:
        ValueError: If the file is no complete record of costs. The message is one line.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"not valid JSON (truncated?): {str(error).splitlines()[0]}") from None
    if not isinstance(record, dict):
        raise ValueError(f"a record is a JSON object, but this is a {type(record).__name__}")
    required = {"cost": _SETTING_KEYS, "provenance": ("started",), "rows": (), "machine": (), "pixels": ()}
    for part, names in required.items():
        for name in (part, *names):
            if name not in (record if name == part else record[part]):
                raise ValueError(f"lacks {part if name == part else f'{part}.{name}'}; measure it again")
    for number, row in enumerate(record["rows"]):
        if lacking := [name for name in _ROW_KEYS if name not in row]:
            raise ValueError(f"lacks rows.{number}.{lacking[0]}; measure it again")
    if not any(row["model"] == "LLaVA" for row in record["rows"]):
        raise ValueError("lacks a row of LLaVA; measure it again")
    return record
