"""Run groups: the records of one configuration over its seeds, and their comparison with a baseline."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from experiments.config.identity import IGNORED_SETTINGS
from experiments.config.plain import flatten_config
from experiments.records.benchmarks import is_benchmark_record
from experiments.records.files import Records
from experiments.records.views import (
    Record,
    analyses_one_model,
    configuration_key,
    failure_reason,
    is_attention_experiment,
    mean_visual_tokens,
    model_files,
    parse_outcomes,
    record_seed,
    start_time,
)
from experiments.report.file_versions import data_versions, version_settings
from experiments.report.formatting import setting_text
from experiments.report.statistics import Interval, accuracy_interval, difference_interval, holm, paired_test


@dataclass(frozen=True)
class RunGroup:
    """The records of one configuration, one for each seed.

    Args:
        label: "LLaVA" or "LLaVA-Mini".
        visual_tokens: Visual tokens that the language model reads, mean over its layers; None if no record reports them.
        prefusion_layers: Number of pre-fusion layers.
        compressor: Name of the compressor, "none" without one.
        settings: Settings in which the groups of a report differ and which have no column of their own.
        family: Key that is equal for groups trained alike on the same data.
        finished: Records of finished runs, sorted by seed.
        failed: Records of failed runs, sorted by seed.
        difference: Accuracy minus the baseline's on the same examples, from -1 to 1.
        p_value: P-value of that difference, corrected for the number of groups compared.
        comparison: Reason why there is no difference, "" if there is one.
    """

    label: str
    visual_tokens: float | None
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
        """All records, finished ones first."""
        return (*self.finished, *self.failed)

    @functools.cached_property
    def config(self) -> Mapping[str, Any]:
        """The configuration by dotted keys, without the seed and incidental settings."""
        config = self.records[0]["config"]
        return dict(
            flatten_config({key: value for key, value in config.items() if key not in ("seed", *IGNORED_SETTINGS)})
        )

    @property
    def accuracy(self) -> Interval | None:
        """Mean accuracy over examples and seeds with its interval, None if no seed is finished."""
        if not self.finished:
            return None
        return _cached_accuracy_interval(tuple(record["accuracy"]["image"] for record in self.finished))

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the data, "" if no record is finished."""
        return self.finished[0]["data"]["fingerprint"] if self.finished else ""

    @property
    def is_baseline(self) -> bool:
        """Whether the model is plain LLaVA: no compression, no pre-fusion, and no token dropped inside the language model."""
        dropping = self.config.get("reduction.name", "none")
        return self.compressor == "none" and self.prefusion_layers == 0 and dropping == "none"

    @property
    def is_attention_experiment(self) -> bool:
        """Whether all records belong to an attention experiment, which probes one model and is no ablation."""
        return all(map(is_attention_experiment, self.records))

    @property
    def only_analyses(self) -> bool:
        """Whether all runs belong to experiments that analyse one model and compare no configurations."""
        return all(map(analyses_one_model, self.records))

    @property
    def model_files(self) -> Mapping[str, str]:
        """Hash of the model's files by setting, empty if no record is finished or says it."""
        return model_files(self.finished[0]) if self.finished else {}

    @property
    def lost(self) -> tuple[Record, ...]:
        """Failed records of seeds that are not finished. Of the others, an earlier run is finished."""
        seeds = set(map(record_seed, self.finished))
        return tuple(record for record in self.failed if record_seed(record) not in seeds)

    @property
    def failure_reasons(self) -> str:
        """Why seeds failed, in one line; "" if none did."""
        reasons = "; ".join(sorted({failure_reason(record) for record in self.lost}))
        if not self.finished:
            return reasons
        parts = [f"{len(self.lost)} of {len(self.lost) + len(self.finished)} seeds {reasons}"] if self.lost else []
        parts += [
            f"a newer run of seed {record_seed(record)} {failure_reason(record)}"
            for record in self.failed
            if record not in self.lost
        ]
        return "; ".join(parts)

    @property
    def examples(self) -> int:
        """Number of test examples of one seed."""
        return self.finished[0]["data"]["examples"]

    @property
    def flops(self) -> float:
        """FLOPs of one prompt, NaN if no record counts them."""
        return self._mean_cost("flops")

    @property
    def cache_bytes(self) -> float:
        """Bytes of the keys and values of one prompt, NaN if no record counts them."""
        return self._mean_cost("cache_bytes")

    @property
    def latency(self) -> float:
        """Seconds of the prefill of one prompt, NaN if it was not measured."""
        return self._mean_cost("latency")

    def _mean_cost(self, name: str) -> float:
        costs = (record.get("cost") or {} for record in self.finished)
        counts = [cost[name] for cost in costs if name in cost]
        return float(np.mean(counts)) if counts else math.nan

    def outcomes(self, view: str = "image") -> np.ndarray | None:
        """Return the 0/1 outcomes [seeds, examples] of one view.

        Args:
            view: "image" (the model's own image), "blank" or "shuffled".

        Returns:
            The outcomes, or None if a finished seed did not record this view.
        """
        texts = [record["accuracy"].get(view) for record in self.finished]
        if not texts or None in texts:
            return None
        return np.stack([parse_outcomes(text) for text in texts])


def group_runs(records: Records) -> tuple[RunGroup, ...]:
    """Group all records by configuration: baselines first, then by compressor and size.

    Records belong to one group if their configurations differ only in the seed, and their data and the files of their
    models are the same. Records that name no files are of one version among themselves. Records with benchmarks have no accuracy, and belong to none (experiments/report/benchmark_rows.py).

    Args:
        records: The records of a results folder.

    Returns:
        The groups, with the settings in which they differ.
    """
    groups: dict[_GroupKey, list[Record]] = defaultdict(list)
    for record in itertools.filterfalse(is_benchmark_record, records.finished):
        files = json.dumps(model_files(record), sort_keys=True)
        groups[configuration_key(record["config"], "seed"), record["data"]["fingerprint"], files].append(record)
    failed: dict[_GroupKey, list[Record]] = defaultdict(list)
    for record in itertools.filterfalse(is_benchmark_record, records.failed):
        config, family = configuration_key(record["config"], "seed"), _family_configuration(record["config"])
        # A failed record names neither data nor files. It joins the group of its own configuration that lacks its seed,
        # or the newest, or else gets the fingerprint of models trained alike, so that it appears in their table.
        same_config = [key for key in groups if key[0] == config]
        same_family = (
            (config, *key[1:]) for key, group in groups.items() if _family_configuration(group[0]["config"]) == family
        )
        if same_config:
            key = max(same_config, key=lambda key: _fit(groups[key], record_seed(record)))
        else:
            key = next(same_family, (config, "", ""))
        failed[key].append(record)
    run_groups = [_make_group(groups[key], failed[key], *key[1:]) for key in dict.fromkeys((*groups, *failed))]
    run_groups.sort(key=lambda g: (g.family, not g.is_baseline, g.compressor, g.visual_tokens or 0, g.prefusion_layers))
    return name_differing_settings(run_groups)


_GroupKey: TypeAlias = tuple[str, str, str]
"""Configuration without seed, fingerprint of the data, and files of the model."""


def _fit(group: Sequence[Record], seed: int | None) -> tuple[bool, str]:
    """Return a sort key by which a failed record finds its group: without its seed, then by time."""
    return seed not in map(record_seed, group), max(map(start_time, group))


def name_differing_settings(groups: Sequence[RunGroup]) -> tuple[RunGroup, ...]:
    """Return the groups with `settings` set to those in which they differ from each other."""
    settings = _differing_settings(groups)
    names = [
        (g.label, g.visual_tokens, g.compressor, g.prefusion_layers, s) for g, s in zip(groups, settings, strict=True)
    ]
    data = data_versions(names, [group.records[0] for group in groups])
    settings = [", ".join(filter(None, texts)) for texts in zip(settings, data, strict=True)]
    return tuple(replace(group, settings=text) for group, text in zip(groups, settings, strict=True))


def compare_with_baselines(groups: Iterable[RunGroup]) -> tuple[RunGroup, ...]:
    """Compare each ablation group with its baseline and drop groups that only analyse one model.

    The baseline is the LLaVA whose configuration differs only in the reduction of tokens and in pre-fusion, as
    `baselines` chooses it. P-values are corrected (Holm) for the number of groups compared.

    Args:
        groups: Groups of the same results folder.

    Returns:
        The ablation groups with `difference`, `p_value` and `comparison`.
    """
    return tuple(_with_comparisons(name_differing_settings([g for g in groups if not g.only_analyses])))


def baselines(groups: Iterable[RunGroup]) -> dict[str, RunGroup]:
    """Return the plain LLaVA of each family that the other groups are compared with.

    Runs that differ in settings without effect may give a family several. The one with the most seeds counts, and of
    these the newest.

    Args:
        groups: Groups of the same results folder.

    Returns:
        The baselines by family; a family without a finished one is missing.
    """
    plain = [group for group in groups if group.is_baseline and group.finished]
    plain.sort(key=lambda group: (len(group.finished), max(map(start_time, group.finished))))
    return {group.family: group for group in plain}


def _make_group(finished: list[Record], failed: list[Record], fingerprint: str, files: str) -> RunGroup:
    finished, failed = (sorted(part, key=lambda record: str(record_seed(record))) for part in (finished, failed))
    config = (*finished, *failed)[0]["config"]
    family = f"{_family_configuration(config)} {fingerprint}"
    # The files of pre-fusion layers may differ within a family, as their settings may.
    if shared := [item for item in json.loads(files or "{}").items() if not item[0].startswith("prefusion.")]:
        family += f" {shared}"
    if finished:
        model, mean = finished[0]["model"], mean_visual_tokens(finished)
        tokens: float | None = int(mean) if mean.is_integer() else mean
        label, layers = model["label"], model["prefusion_layers"]
        compressor = model["compressor"]
    else:
        compressor = config.get("compressor", {}).get("name", "unknown")
        layers = config.get("prefusion", {}).get("layers", 0)
        size = config.get("compressor", {}).get("size")
        tokens = None if compressor == "none" or size is None else size**2
        label = "LLaVA" if compressor == "none" and layers == 0 else "LLaVA-Mini"
    return RunGroup(label, tokens, layers, compressor, "", family, tuple(finished), tuple(failed))


@functools.cache
def _cached_accuracy_interval(texts: tuple[str, ...]) -> Interval:
    """Return the accuracy interval of outcome strings, cached because several tables and figures show a group."""
    return accuracy_interval(np.stack([parse_outcomes(text) for text in texts]))


def _with_comparisons(groups: Sequence[RunGroup]) -> Iterable[RunGroup]:
    of_family = baselines(groups)
    compared = [g for g in groups if g.finished and of_family.get(g.family, g) is not g]
    pairs = [(_image_outcomes(group), _image_outcomes(of_family[group.family])) for group in compared]
    p_values = holm([paired_test(*pair) for pair in pairs])
    results = {
        id(group): (difference_interval(*pair), p) for group, pair, p in zip(compared, pairs, p_values, strict=True)
    }
    for group in groups:
        difference, p_value = results.get(id(group), (None, None))
        if difference is not None:
            comparison = ""
        elif not group.finished:
            comparison = "failed"
        else:
            comparison = "baseline" if group.is_baseline else "no baseline"
        yield replace(group, difference=difference, p_value=p_value, comparison=comparison)


def _image_outcomes(group: RunGroup) -> np.ndarray:
    return np.stack([parse_outcomes(record["accuracy"]["image"]) for record in group.finished])


def _family_configuration(config: Mapping[str, Any]) -> str:
    return configuration_key(config, "seed", "compressor", "prefusion", "reduction", "budget")


def _differing_settings(groups: Sequence[RunGroup]) -> list[str]:
    """Return, for each group, its settings that differ between groups and have no column of their own."""
    own_column = {"compressor.name", "compressor.size", "prefusion.layers"}
    flat = [{key: value for key, value in group.config.items() if key not in own_column} for group in groups]
    for settings, group in zip(flat, groups, strict=True):
        for part, name, unused in _PARTS_WITHOUT_EFFECT:
            if group.config.get(part + name) == unused:
                for key in [key for key in settings if key.startswith(part)]:
                    del settings[key]
    for settings, versions in zip(flat, version_settings([group.records[0] for group in groups]), strict=True):
        settings |= versions
    values: dict[str, set[str]] = defaultdict(set)
    for settings in flat:
        for key, value in settings.items():
            values[key].add(str(value))
    differing = {key for key, texts in values.items() if len(texts) > 1}
    return [
        ", ".join(setting_text(key, settings[key]) for key in sorted(differing & settings.keys())) for settings in flat
    ]


_PARTS_WITHOUT_EFFECT = (
    ("compressor.", "name", "none"),
    ("prefusion.", "layers", 0),
    ("reduction.", "name", "none"),
    ("budget.", "method", "none"),
)
"""Parts of a configuration that have no effect if one of their settings has a value: part, setting and value."""
