"""Ablation cells: the records of one configuration, its seeds taken together, compared with their baseline."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from experiments.report.records import Record, Records, failure, outcomes
from experiments.report.statistics import Interval, accuracy_interval, difference_interval, holm, paired_test


@dataclass(frozen=True)
class Cell:
    """One configuration of an ablation over its seeds.

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
    accuracy: Interval | None = None
    difference: Interval | None = None
    p_value: float | None = None
    comparison: str = ""

    @property
    def is_baseline(self) -> bool:
        """Plain LLaVA: no compression, no pre-fusion."""
        return self.compressor == "none" and self.prefusion_layers == 0

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


def ablation_cells(records: Records) -> tuple[Cell, ...]:
    """The cells of every record that is not of the attention experiment: baselines first, then by compressor and size.

    Records belong to one cell if their configurations differ in nothing but the seed and their data are the same. A
    cell's baseline is the LLaVA whose configuration differs in nothing but the compressor and pre-fusion. P-values are
    corrected (Holm) for the number of cells compared.
    """
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records.finished:
        if record["experiment"] != "attention":
            groups[_key(record["config"], "seed"), record["data"]["fingerprint"]].append(record)
    failed: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records.failed:
        if record["experiment"] != "attention":
            config, family = _key(record["config"], "seed"), _family(record["config"])
            # A failed record does not know its data: it joins its own cell, or the table, of those trained alike.
            own = (key for key in groups if key[0] == config)
            alike = ((config, key[1]) for key, found in groups.items() if _family(found[0]["config"]) == family)
            failed[next(iter((*own, *alike)), (config, ""))].append(record)

    keys = list(dict.fromkeys((*groups, *failed)))
    settings = _differing_settings([(*groups[key], *failed[key])[0] for key in keys])
    cells = [_cell(groups[key], failed[key], text, key[1]) for key, text in zip(keys, settings, strict=True)]
    cells.sort(key=lambda c: (c.family, not c.is_baseline, c.compressor, c.visual_tokens or 0, c.prefusion_layers))
    return tuple(_compare(cells))


def _cell(finished: list[Record], failed: list[Record], settings: str, fingerprint: str) -> Cell:
    finished = sorted(finished, key=lambda record: str(record["config"].get("seed")))
    config = (*finished, *failed)[0]["config"]
    family = f"{_family(config)} {fingerprint}"
    if finished:
        model = finished[0]["model"]
        label, tokens, layers = model["label"], model["visual_tokens"], model["prefusion_layers"]
        compressor = model["compressor"]
        accuracy = accuracy_interval(np.stack([outcomes(record["accuracy"]["image"]) for record in finished]))
    else:
        accuracy = None
        compressor = config.get("compressor", {}).get("name", "unknown")
        layers = config.get("prefusion", {}).get("layers", 0)
        size = config.get("compressor", {}).get("size")
        tokens = None if compressor == "none" or size is None else size**2
        label = "LLaVA" if compressor == "none" and layers == 0 else "LLaVA-Mini"
    return Cell(label, tokens, layers, compressor, settings, family, tuple(finished), tuple(failed), accuracy)


def _compare(cells: list[Cell]) -> Iterable[Cell]:
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


def _key(config: Mapping[str, Any], *without: str) -> str:
    return json.dumps({key: value for key, value in config.items() if key not in without}, sort_keys=True)


def _family(config: Mapping[str, Any]) -> str:
    return _key(config, "seed", "compressor", "prefusion")


def _differing_settings(records: list[Record]) -> list[str]:
    """For each record, its settings that are not equal in all of them and have no column of their own."""
    shown = {"seed", "compressor.name", "compressor.size", "prefusion.layers"}
    flat = [{key: value for key, value in _flatten(record["config"]) if key not in shown} for record in records]
    for settings, record in zip(flat, records, strict=True):
        # A cell without compressor or pre-fusion has no use for their other settings.
        model = record["config"]
        for part, unused in (("compressor.", "none"), ("prefusion.", 0)):
            group = model.get(part[:-1], {})
            if group.get("name" if part == "compressor." else "layers") == unused:
                for key in [key for key in settings if key.startswith(part)]:
                    del settings[key]
    values: dict[str, set[str]] = defaultdict(set)
    for settings in flat:
        for key, value in settings.items():
            values[key].add(str(value))
    differing = {key for key, found in values.items() if len(found) > 1}
    return [", ".join(f"{key}={settings[key]}" for key in sorted(differing & settings.keys())) for settings in flat]


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
