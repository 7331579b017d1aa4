"""Records of measured costs: what one holds, and how a folder of them is read."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

Record: TypeAlias = Mapping[str, Any]
Row: TypeAlias = Mapping[str, Any]

PARTS = {
    "tower": "vision tower",
    "projector": "projector",
    "compressor": "compressor",
    "prefusion": "pre-fusion",
    "prefill": "language model",
    "head": "head",
}
"""What runs until the first token, as rows name it and as tables do."""

_ROW = ("model", "size", "frames", "visual_tokens", "prefusion_layers", "flops", "seconds", "memory", "cache_estimate")
_SETTING = ("geometry", "dtype", "tiles", "text")


@dataclass(frozen=True)
class Ratio:
    """How many times as long one run takes as another: the ratio of medians, the least and the most of a round."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"


@dataclass(frozen=True, order=True)
class Setting:
    """What must be equal for costs to be compared.

    Args:
        pixels: A side of a picture, in all its tiles.
        text: Tokens of the question.
        layers: Of pre-fusion.
        machine: The device's name.
    """

    geometry: str
    pixels: int
    tiles: int
    text: int
    layers: int
    dtype: str
    machine: str

    @classmethod
    def of(cls, record: Record) -> Setting:
        given = {name: record["cost"][name] for name in _SETTING}
        layers = max(row["prefusion_layers"] for row in record["rows"])
        return cls(**given, layers=layers, pixels=record["pixels"], machine=record["machine"])

    def __str__(self) -> str:
        return f"{self.geometry}, {self.pixels} px, {self.dtype}, {self.machine}"


@dataclass(frozen=True)
class Measured:
    """A model over some frames. `ratio` is LLaVA's time to the first token over this one's, None where either did not
    run."""

    row: Row
    ratio: Ratio | None

    @property
    def size(self) -> int:
        """C; 0 is LLaVA."""
        return self.row["size"]

    @property
    def frames(self) -> int:
        return self.row["frames"]

    @property
    def name(self) -> str:
        return self.row["model"].removeprefix("LLaVA-Mini, ")

    @property
    def seconds(self) -> dict[str, float] | None:
        """Medians of the rounds, of PARTS, "first token" and "decode"."""
        times = self.row["seconds"]
        return times and {name: statistics.median(rounds) for name, rounds in times.items()}

    @property
    def flops(self) -> float:
        """Until the first token."""
        return sum(self.row["flops"][part] for part in PARTS)

    @property
    def peak(self) -> int | None:
        """Bytes at most on the device where the model is."""
        memory = self.row["memory"]
        return memory and memory.get("allocated", memory["resident"])


def ratios(record: Record, name: str) -> dict[tuple[str, int], Ratio | None]:
    """How many times as long LLaVA takes for `name`, an entry of `seconds`, by model and frames. None where either did
    not run."""
    llava = {row["frames"]: row["seconds"] for row in record["rows"] if row["model"] == "LLaVA"}
    found: dict[tuple[str, int], Ratio | None] = {}
    for row in record["rows"]:
        ours, theirs = row["seconds"], llava[row["frames"]]
        key = row["model"], row["frames"]
        found[key] = None
        if ours is not None and theirs is not None:
            rounds = [a / b for a, b in zip(theirs[name], ours[name], strict=True)]
            medians = statistics.median(theirs[name]) / statistics.median(ours[name])
            found[key] = Ratio(medians, min(rounds), max(rounds))
    return found


def measured(records: Sequence[Record]) -> dict[Setting, list[Measured]]:
    """All that was measured, LLaVA first and then by C and by frames. Of what was measured twice in a setting the newer
    holds; a ratio is always of two runs that took turns."""
    found: dict[Setting, dict[tuple[int, int], Measured]] = {}
    for record in sorted(records, key=lambda record: record["provenance"]["started"]):
        rows = found.setdefault(Setting.of(record), {})
        first = ratios(record, "first token")
        for row in record["rows"]:
            rows[row["size"], row["frames"]] = Measured(row, first[row["model"], row["frames"]])
    return {setting: [rows[key] for key in sorted(rows)] for setting, rows in sorted(found.items())}


def load(folder: Path) -> tuple[list[Record], list[str]]:
    """Every `*.json` in `folder`, and a line for each that is no record of costs.

    Raises:
        FileNotFoundError: If there is no file at all.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise FileNotFoundError(f"no records in {folder}: make some with `python -m experiments.run experiment=cost`")
    records, wrong = [], []
    for path in paths:
        try:
            records.append(read(path))
        except (OSError, ValueError) as error:
            wrong.append(f"{path.name}: {error}")
    return records, wrong


def read(path: Path) -> Record:
    """Raises ValueError, in one line, for what is no whole record of costs."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"not valid JSON (truncated?): {str(error).splitlines()[0]}") from None
    if not isinstance(record, dict):
        raise ValueError(f"a record is a JSON object, this is a {type(record).__name__}")
    needed = {"cost": _SETTING, "provenance": ("started",), "rows": (), "machine": (), "pixels": ()}
    for part, names in needed.items():
        for name in (part, *names):
            if name not in (record if name == part else record[part]):
                raise ValueError(f"lacks {part if name == part else f'{part}.{name}'}: measure it again")
    for number, row in enumerate(record["rows"]):
        if lacking := [name for name in _ROW if name not in row]:
            raise ValueError(f"lacks rows.{number}.{lacking[0]}: measure it again")
    if not any(row["model"] == "LLaVA" for row in record["rows"]):
        raise ValueError("lacks a row of LLaVA: measure it again")
    return record
