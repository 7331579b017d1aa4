"""The tables that conf/experiment/ defines by their rows, read as plain YAML: no configuration is composed."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config import rows

FOLDER = Path(str(resources.files("conf"))) / "experiment"
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_SCALED = re.compile(r"^\$\{scaled:\$\{model\.grid\}, *(\d+)(?:, *(\d+))?\}$")


@dataclass(frozen=True)
class Setting:
    """One or more rows of a definition that are the same settings on a model: their labels joined."""

    label: str
    values: Mapping[str, Any]
    paper: tuple[Mapping[str, float], ...]


@dataclass(frozen=True)
class Definition:
    """A table before it has records: the rows of `conf/experiment/<name>.yaml`, its title from the comment on top."""

    name: str
    title: str
    rows: tuple[rows.Row, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """What the rows name, as dotted keys of a configuration."""
        return tuple(self.rows[0].settings)

    def leaves_open(self, key: str) -> bool:
        """Whether cells of this table may differ in this key: its rows name it, or a budget that they name chose it."""
        budgeted = any(named.startswith("budget.") for named in self.keys)
        return key in self.keys or (budgeted and key.startswith(("compressor.", "reduction.")))

    def settings(self, config: Mapping[str, Any]) -> tuple[Setting, ...]:
        """The rows on the model of a configuration (dotted keys), in order; those that coincide there are one.

        Raises:
            ValueError: if a row needs something of the configuration that it does not have.
        """
        referred = {key: config[key] for key in self._references if key in config}
        kept = repr(sorted(referred.items()))
        if kept not in self._settings:
            self._settings[kept] = self._resolve(referred)
        return self._settings[kept]

    @functools.cached_property
    def _references(self) -> frozenset[str]:
        """The keys of a configuration that the rows' values refer to."""
        return frozenset(_REFERENCE.findall(repr([row.settings for row in self.rows]))) - set(self.keys)

    @functools.cached_property
    def _settings(self) -> dict[str, tuple[Setting, ...]]:
        return {}  # by what is referred to: few models, many configurations

    def _resolve(self, referred: Mapping[str, Any]) -> tuple[Setting, ...]:
        rows.register()
        context = OmegaConf.create({"_rows": [row.settings for row in self.rows]})
        for key, value in referred.items():
            OmegaConf.update(context, key, value)
        try:
            resolved = OmegaConf.to_container(context["_rows"], resolve=True)
        except OmegaConfBaseException as error:
            raise ValueError(f"experiment {self.name}: {str(error).splitlines()[0]}") from None
        assert isinstance(resolved, list)
        alike: list[tuple[dict[str, Any], list[rows.Row]]] = []
        for row, values in zip(self.rows, resolved, strict=True):
            found = next((some for settings, some in alike if settings == values), None)
            if found is None:
                alike.append((values, [row]))
            else:
                found.append(row)
        return tuple(
            Setting(joined([row.label for row in some]), values, tuple(row.paper for row in some))
            for values, some in alike
        )

    def scaled_sizes(self, config: Mapping[str, Any]) -> str:
        """How the paper's sizes became those of the model of a configuration, in a sentence; "" where none did."""
        grid = config.get("model.grid")
        found = [_SCALED.match(str(value)) for row in self.rows for value in row.settings.values()]
        sizes = sorted({(int(match[2] or 1), int(match[1])) for match in found if match})
        if not sizes or grid in (None, rows.PAPER_GRID):
            return ""
        steps = {
            tiles: ", ".join(f"{size} to {rows.scaled(grid, size, tiles)}" for n, size in sizes if n == tiles)
            for tiles, _ in sizes
        }
        once = f": {steps.pop(1)}" if 1 in steps else ""
        tiled = "".join(
            f"; with {n} tiles a side both grids are {n} times as wide: {some}" for n, some in steps.items()
        )
        paper = rows.PAPER_GRID
        return (
            f"Row labels name the paper's sizes: its C of a {paper} x {paper} grid is brought to this model's "
            f"{grid} x {grid} by {grid}^(ln C / ln {paper}), rounded{once}{tiled}."
        )


def definitions(folder: Path = FOLDER) -> tuple[Definition, ...]:
    """Every experiment of a folder that has rows, by name: table6 before table10.

    Raises:
        ValueError: if the rows of one are no table.
    """
    found = []
    for path in sorted(folder.glob("*.yaml"), key=_natural):
        text = path.read_text(encoding="utf-8")
        if "\nrows:" in text:
            plain = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
            assert isinstance(plain, dict)
            read = rows.read(path.stem, plain["rows"])
            found.append(Definition(path.stem, _title(text) or path.stem, tuple(read)))
    return tuple(found)


def _natural(path: Path) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.stem)]


def joined(labels: Sequence[str]) -> str:
    """Labels as one, what they end in alike said once: "16 / 64 tokens"."""
    words = [label.split() for label in labels]
    last: list[str] = []
    while len(labels) > 1 and all(len(some) > 1 for some in words) and len({some[-1] for some in words}) == 1:
        last.insert(0, words[0][-1])
        words = [some[:-1] for some in words]
    return " ".join([" / ".join(" ".join(some) for some in words), *last])


def _title(text: str) -> str:
    """The first sentence of the comment that an experiment's file opens with."""
    lines = text.removeprefix("# @package _global_\n").splitlines()
    ends = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    comment = " ".join(line.lstrip("# ") for line in lines[:ends])
    return re.split(r"(?<=[.?!]) ", comment)[0]
