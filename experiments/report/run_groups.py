"""Cells: the records of one configuration, its seeds taken together; and how an ablation's compare with its baseline."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from experiments.config.identity import INCIDENTAL
from experiments.records.files import Records
from experiments.records.views import Record, configuration, failure, flatten, of_attention, outcomes, seed
from experiments.report.statistics import Interval, accuracy_interval, difference_interval, holm, paired_test


@dataclass(frozen=True)
class Cell:
    """One configuration over its seeds.

    `settings` names the settings in which the cells of a report differ besides those shown; `family` is equal for cells
    trained alike on the same data. `difference` (from 0 to 1) and `p_value` compare with the baseline on the same
    examples, and `comparison` says in words why there is none.
    """

    label: str
    visual_tokens: int | None
    prefusion_layers: int
    compressor: str
    settings: str
    family: str
    finished: tuple[Record, ...]
    failed: tuple[Record, ...]
    difference: Interval | None = None
    p_value: float | None = None
    comparison: str = ""

    @property
    def records(self) -> tuple[Record, ...]:
        """Finished ones first."""
        return (*self.finished, *self.failed)

    @functools.cached_property
    def config(self) -> Mapping[str, Any]:
        """The configuration by dotted keys, less the seed and what is incidental."""
        config = self.records[0]["config"]
        return dict(flatten({key: value for key, value in config.items() if key not in ("seed", *INCIDENTAL)}))

    @property
    def accuracy(self) -> Interval | None:
        """Mean over examples and seeds with its interval, None where no seed is finished."""
        return _accuracy(tuple(record["accuracy"]["image"] for record in self.finished)) if self.finished else None

    @property
    def fingerprint(self) -> str:
        """Of the data, "" where no finished record says it."""
        return self.finished[0]["data"]["fingerprint"] if self.finished else ""

    @property
    def is_baseline(self) -> bool:
        """Plain LLaVA: no compression, no pre-fusion."""
        return self.compressor == "none" and self.prefusion_layers == 0

    @property
    def is_attention(self) -> bool:
        """Of an attention experiment alone, which is about one model and is no part of an ablation."""
        return all(map(of_attention, self.records))

    @property
    def failures(self) -> str:
        """Why cells are missing, "" when none is."""
        reasons = "; ".join(sorted({failure(record) for record in self.failed}))
        if not self.failed or not self.finished:
            return reasons
        return f"{len(self.failed)} of {len(self.failed) + len(self.finished)} seeds {reasons}"

    @property
    def examples(self) -> int:
        """Test examples of one seed."""
        return self.finished[0]["data"]["examples"]

    @property
    def flops(self) -> float:
        """FLOPs of one prompt, NaN where no record counts them."""
        return self._cost("flops")

    @property
    def cache_bytes(self) -> float:
        """Bytes of the keys and values of one prompt, NaN where no record counts them."""
        return self._cost("cache_bytes")

    @property
    def latency(self) -> float:
        """Seconds of the prefill of one prompt, NaN where none was measured."""
        return self._cost("latency")

    def _cost(self, name: str) -> float:
        costs = (record.get("cost") or {} for record in self.finished)
        counts = [cost[name] for cost in costs if name in cost]
        return float(np.mean(counts)) if counts else math.nan

    def outcomes(self, view: str = "image") -> np.ndarray | None:
        """0/1 outcomes [seeds, examples] of one view ("image", "blank", "shuffled"), None unless every seed has it."""
        texts = [record["accuracy"].get(view) for record in self.finished]
        if not texts or None in texts:
            return None
        return np.stack([outcomes(text) for text in texts])


def group_cells(records: Records) -> tuple[Cell, ...]:
    """The cells of all records: baselines first, then by compressor and size.

    Records belong to one cell if their configurations differ in nothing but the seed and their data are the same.
    """
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records.finished:
        groups[configuration(record["config"], "seed"), record["data"]["fingerprint"]].append(record)
    failed: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records.failed:
        config, family = configuration(record["config"], "seed"), _family(record["config"])
        # A failed record does not know its data: it joins its own cell, or the table, of those trained alike.
        own = (key for key in groups if key[0] == config)
        alike = ((config, key[1]) for key, found in groups.items() if _family(found[0]["config"]) == family)
        failed[next(iter((*own, *alike)), (config, ""))].append(record)
    cells = [_cell(groups[key], failed[key], key[1]) for key in dict.fromkeys((*groups, *failed))]
    cells.sort(key=lambda c: (c.family, not c.is_baseline, c.compressor, c.visual_tokens or 0, c.prefusion_layers))
    return told_apart(cells)


def told_apart(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """The cells with `settings`: those in which they differ from each other."""
    settings = _differing_settings(cells)
    return tuple(replace(cell, settings=text) for cell, text in zip(cells, settings, strict=True))


def ablation_cells(cells: Iterable[Cell]) -> tuple[Cell, ...]:
    """Those of the cells that are not of the attention experiment alone, each compared with its baseline.

    That is the LLaVA whose configuration differs in nothing but the compressor and pre-fusion. P-values are corrected
    (Holm) for the number of cells compared.
    """
    return tuple(_compare(told_apart([cell for cell in cells if not cell.is_attention])))


def _cell(finished: list[Record], failed: list[Record], fingerprint: str) -> Cell:
    finished, failed = (sorted(some, key=lambda record: str(seed(record))) for some in (finished, failed))
    config = (*finished, *failed)[0]["config"]
    family = f"{_family(config)} {fingerprint}"
    if finished:
        model = finished[0]["model"]
        label, tokens, layers = model["label"], model["visual_tokens"], model["prefusion_layers"]
        compressor = model["compressor"]
    else:
        compressor = config.get("compressor", {}).get("name", "unknown")
        layers = config.get("prefusion", {}).get("layers", 0)
        size = config.get("compressor", {}).get("size")
        tokens = None if compressor == "none" or size is None else size**2
        label = "LLaVA" if compressor == "none" and layers == 0 else "LLaVA-Mini"
    return Cell(label, tokens, layers, compressor, "", family, tuple(finished), tuple(failed))


@functools.cache
def _accuracy(texts: tuple[str, ...]) -> Interval:
    """Kept, since a cell is shown in several tables and figures."""
    return accuracy_interval(np.stack([outcomes(text) for text in texts]))


def _compare(cells: Sequence[Cell]) -> Iterable[Cell]:
    baselines = {cell.family: cell for cell in cells if cell.is_baseline and cell.finished}
    compared = [cell for cell in cells if cell.finished and not cell.is_baseline and cell.family in baselines]
    pairs = [(_image(cell), _image(baselines[cell.family])) for cell in compared]
    p_values = holm([paired_test(*pair) for pair in pairs])
    results = {
        id(cell): (difference_interval(*pair), p) for cell, pair, p in zip(compared, pairs, p_values, strict=True)
    }
    for cell in cells:
        difference, p_value = results.get(id(cell), (None, None))
        if difference is not None:
            comparison = ""
        elif not cell.finished:
            comparison = "failed"
        else:
            comparison = "baseline" if cell.is_baseline else "no baseline"
        yield replace(cell, difference=difference, p_value=p_value, comparison=comparison)


def _image(cell: Cell) -> np.ndarray:
    return np.stack([outcomes(record["accuracy"]["image"]) for record in cell.finished])


def _family(config: Mapping[str, Any]) -> str:
    return configuration(config, "seed", "compressor", "prefusion")


def _differing_settings(cells: Sequence[Cell]) -> list[str]:
    """For each cell, its settings that are not equal in all of them and have no column of their own."""
    shown = {"compressor.name", "compressor.size", "prefusion.layers"}
    flat = [{key: value for key, value in cell.config.items() if key not in shown} for cell in cells]
    for settings, cell in zip(flat, cells, strict=True):
        # A cell without compressor or pre-fusion has no use for their other settings.
        for part, name, unused in (("compressor.", "name", "none"), ("prefusion.", "layers", 0)):
            if cell.config.get(part + name) == unused:
                for key in [key for key in settings if key.startswith(part)]:
                    del settings[key]
    values: dict[str, set[str]] = defaultdict(set)
    for settings in flat:
        for key, value in settings.items():
            values[key].add(str(value))
    differing = {key for key, found in values.items() if len(found) > 1}
    return [", ".join(f"{key}={settings[key]}" for key in sorted(differing & settings.keys())) for settings in flat]
