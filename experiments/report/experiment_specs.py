"""Experiment specs: the rows of each table, read from conf/experiment/ as plain YAML without composing configurations."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config import rows as table_rows

SPEC_FOLDER = Path(str(resources.files("conf"))) / "experiment"
KEPT_SPECS = "experiments"
"""Folder in a results folder that keeps the rows of tables that the project does not ship."""
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_SCALED_SIZE = re.compile(r"^\$\{scaled:\$\{model\.grid\}, *(\d+)(?:, *(\d+))?\}$")


@dataclass(frozen=True)
class RowSettings:
    """Settings of one table row on a given model.

    Args:
        label: The row's label. If several rows have the same settings on this model, their labels are joined.
        values: Dotted keys of the configuration with their values.
        paper: For each joined row, the values that the paper prints, by benchmark.
    """

    label: str
    values: Mapping[str, Any]
    paper: tuple[Mapping[str, float], ...]


@dataclass(frozen=True)
class ExperimentSpec:
    """The table that an experiment defines, before it has records.

    Args:
        name: Name of the experiment: its file is conf/experiment/<name>.yaml.
        title: First sentence of the comment at the top of that file.
        rows: The rows of the table.
    """

    name: str
    title: str
    rows: tuple[table_rows.TableRow, ...]

    @property
    def setting_keys(self) -> tuple[str, ...]:
        """Dotted keys of the settings that the rows name."""
        return tuple(self.rows[0].settings)

    def may_vary(self, key: str) -> bool:
        """Return whether runs of this table may differ in a dotted key.

        They may if the rows name the key, or if a budget that the rows name chose its value.
        """
        names_budget = any(named.startswith("budget.") for named in self.setting_keys)
        return key in self.setting_keys or (names_budget and key.startswith(("compressor.", "reduction.")))

    def resolve_rows(self, config: Mapping[str, Any]) -> tuple[RowSettings, ...]:
        """Return the rows on the model of a configuration, in order; rows with equal settings are merged.

        Args:
            config: A configuration by dotted keys.

        Raises:
            ValueError: if a row refers to a key that the configuration lacks.
        """
        referenced = {key: config[key] for key in self._referenced_keys if key in config}
        cache_key = repr(sorted(referenced.items()))
        if cache_key not in self._resolved:
            self._resolved[cache_key] = self._resolve(referenced)
        return self._resolved[cache_key]

    @functools.cached_property
    def _referenced_keys(self) -> frozenset[str]:
        """The keys of a configuration that the rows' values refer to."""
        return frozenset(_REFERENCE.findall(repr([row.settings for row in self.rows]))) - set(self.setting_keys)

    @functools.cached_property
    def _resolved(self) -> dict[str, tuple[RowSettings, ...]]:
        """Resolved rows by referenced values: many configurations share few models."""
        return {}

    def _resolve(self, referenced: Mapping[str, Any]) -> tuple[RowSettings, ...]:
        table_rows.register_resolvers()
        context = OmegaConf.create({"_rows": [row.settings for row in self.rows]})
        for key, value in referenced.items():
            OmegaConf.update(context, key, value)
        try:
            resolved = OmegaConf.to_container(context["_rows"], resolve=True)
        except OmegaConfBaseException as error:
            raise ValueError(f"experiment {self.name}: {str(error).splitlines()[0]}") from None
        assert isinstance(resolved, list)
        merged: list[tuple[dict[str, Any], list[table_rows.TableRow]]] = []
        for row, values in zip(self.rows, resolved, strict=True):
            same_settings = next((members for settings, members in merged if settings == values), None)
            if same_settings is None:
                merged.append((values, [row]))
            else:
                same_settings.append(row)
        return tuple(
            RowSettings(join_labels([row.label for row in members]), values, tuple(row.paper for row in members))
            for values, members in merged
        )

    def scaling_note(self, config: Mapping[str, Any]) -> str:
        """Return a sentence on how the paper's sizes were scaled to the model's grid, "" if none was.

        Args:
            config: A configuration by dotted keys.
        """
        grid = config.get("model.grid")
        matches = [_SCALED_SIZE.match(str(value)) for row in self.rows for value in row.settings.values()]
        sizes = sorted({(int(match[2] or 1), int(match[1])) for match in matches if match})
        if not sizes or grid in (None, table_rows.PAPER_GRID):
            return ""
        steps = {
            tiles: ", ".join(
                f"{size} to {table_rows.scaled_size(grid, size, tiles)}" for n, size in sizes if n == tiles
            )
            for tiles, _ in sizes
        }
        untiled = f": {steps.pop(1)}" if 1 in steps else ""
        tiled = "".join(
            f"; with {n} tiles a side both grids are {n} times as wide: {sizes_text}" for n, sizes_text in steps.items()
        )
        paper = table_rows.PAPER_GRID
        return (
            f"Row labels name the paper's sizes. A size C of the paper's {paper} x {paper} grid is scaled to this model's "
            f"{grid} x {grid} grid by {grid}^(ln C / ln {paper}), rounded{untiled}{tiled}."
        )


def load_specs(folder: Path = SPEC_FOLDER) -> tuple[ExperimentSpec, ...]:
    """Read every experiment of a folder that defines rows, in natural order (table6 before table10).

    Args:
        folder: Folder of YAML files; the project's conf/experiment by default.

    Raises:
        ValueError: if the rows of an experiment are malformed.
    """
    specs = map(_read_spec, sorted(folder.glob("*.yaml"), key=_natural_sort_key))
    return tuple(spec for spec in specs if spec is not None)


@functools.cache
def shipped_rows(name: str) -> tuple[table_rows.TableRow, ...] | None:
    """Return the rows of an experiment of the project, None if it has none of this name or the experiment no rows."""
    path = SPEC_FOLDER / f"{name}.yaml"
    spec = _read_spec(path) if path.is_file() else None
    return None if spec is None else spec.rows


def load_all_specs(results: Path) -> tuple[ExperimentSpec, ...]:
    """Read the project's experiments and those that a results folder keeps, in natural order.

    A run keeps the rows of a table that the project does not ship in `experiments/` of its results folder. A kept table
    replaces the project's of the same name, because the records belong to its rows.

    Args:
        results: A results folder.

    Raises:
        ValueError: if the rows of an experiment are malformed.
        OSError: if a file cannot be read.
    """
    by_name = {spec.name: spec for folder in (SPEC_FOLDER, results / KEPT_SPECS) for spec in load_specs(folder)}
    return tuple(sorted(by_name.values(), key=lambda spec: _natural_sort_key(Path(spec.name))))


def join_labels(labels: Sequence[str]) -> str:
    """Join labels and write a common ending once: "16 tokens" and "64 tokens" become "16 / 64 tokens"."""
    words = [label.split() for label in labels]
    ending: list[str] = []
    while len(labels) > 1 and all(len(w) > 1 for w in words) and len({w[-1] for w in words}) == 1:
        ending.insert(0, words[0][-1])
        words = [w[:-1] for w in words]
    return " ".join([" / ".join(" ".join(w) for w in words), *ending])


def _read_spec(path: Path) -> ExperimentSpec | None:
    text = path.read_text(encoding="utf-8")
    if "\nrows:" not in text:
        return None
    try:
        plain = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(plain, dict) or not plain.get("rows"):
        raise ValueError(f"{path}: holds no rows")
    rows = table_rows.read_rows(path.stem, plain["rows"])
    return ExperimentSpec(path.stem, first_comment_sentence(text) or path.stem, tuple(rows))


def _natural_sort_key(path: Path) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name.removesuffix(".yaml"))]


def first_comment_sentence(text: str) -> str:
    """Return the first sentence of the comment at the top of an experiment's file."""
    lines = text.removeprefix("# @package _global_\n").splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    comment = " ".join(line.lstrip("# ") for line in lines[:end])
    return re.split(r"(?<=[.?!]) ", comment)[0]
