"""Tests of grouping records over seeds, and of comparing groups with baselines."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from experiments.records.files import Records
from experiments.records.views import parse_outcomes
from experiments.report.run_groups import RunGroup, compare_with_baselines, group_runs
from experiments.report.statistics import paired_test


def ablation_groups(records: list[dict[str, Any]]) -> tuple[RunGroup, ...]:
    finished = tuple(record for record in records if record["status"] == "finished")
    failed = tuple(record for record in records if record["status"] == "failed")
    return compare_with_baselines(group_runs(Records(finished, failed, (), ())))


def test_group_runs_collects_seeds_and_puts_baseline_first(records: list[dict[str, Any]]) -> None:
    groups = ablation_groups(records)
    assert len(groups) == 7
    assert groups[0].is_baseline
    assert groups[0].comparison == "baseline"
    assert [len(group.finished) for group in groups] == [2, 2, 1, 2, 2, 2, 2]
    text = records[0]["accuracy"]["image"] + records[1]["accuracy"]["image"]
    assert groups[0].accuracy is not None
    assert groups[0].accuracy.mean == pytest.approx(text.count("1") / len(text))


def test_compare_with_baselines_p_values_are_holm_corrected(records: list[dict[str, Any]]) -> None:
    groups = ablation_groups(records)
    baseline = groups[0].outcomes()
    raw = [paired_test(group.outcomes(), baseline) for group in groups[1:]]
    corrected = [group.p_value for group in groups[1:]]
    assert min(corrected) == pytest.approx(6 * min(raw))
    assert max(corrected) < 1
    difference = groups[1].difference
    assert difference is not None
    assert difference.mean == pytest.approx(np.mean(groups[1].outcomes()) - np.mean(baseline))


def test_group_runs_failed_record_joins_its_family(records: list[dict[str, Any]]) -> None:
    failed = copy.deepcopy(next(record for record in records if record["status"] == "failed"))
    failed["config"]["compressor"]["size"] = 3
    groups = ablation_groups([*records, failed])
    group = next(group for group in groups if not group.finished)
    assert (group.label, group.compressor, group.visual_tokens, group.prefusion_layers) == (
        "LLaVA-Mini",
        "average",
        9,
        2,
    )
    assert groups.index(group) == 3
    assert group.comparison == "failed"
    assert group.failure_reasons == "failed: RuntimeError: out of memory at step 12_000"
    half = next(group for group in groups if group.finished and group.failed)
    assert half.failure_reasons.startswith("1 of 2 seeds failed")


def test_group_runs_other_settings_make_a_named_group_without_baseline(records: list[dict[str, Any]]) -> None:
    longer = copy.deepcopy(records[4])
    longer["config"]["train"]["max_steps"] = 400
    group = next(group for group in ablation_groups([*records, longer]) if group.settings == "train.max_steps=400")
    assert group.comparison == "no baseline"
    assert group.difference is None


def test_compare_with_baselines_other_data_have_no_baseline(records: list[dict[str, Any]]) -> None:
    other = copy.deepcopy(records[4])
    other["data"]["fingerprint"] = "other"
    group = next(group for group in ablation_groups([*records[:4], other]) if group.finished[0] is other)
    assert group.comparison == "no baseline"


def test_compare_with_baselines_of_two_plain_models_uses_the_one_with_more_seeds(records: list[dict[str, Any]]) -> None:
    newer = copy.deepcopy(records[0])
    newer["config"]["compressor"]["size"] = 4  # without effect: it has no compressor
    newer["id"], newer["provenance"]["started"] = "f" * 16, "2030-01-01T00:00:00"
    groups = ablation_groups([*records, newer])
    plain = [group for group in groups if group.is_baseline and group.difference is None]
    assert [len(group.finished) for group in plain] == [2]
    compared = next(group for group in groups if group.finished == (newer,))
    assert compared.difference is not None


def test_compare_with_baselines_compares_a_model_that_drops_tokens(records: list[dict[str, Any]]) -> None:
    dropping = copy.deepcopy(records[0])
    dropping["config"]["reduction"] = {"name": "fastv", "layers": [2]}
    dropping["model"]["visual_tokens_mean"] = dropping["model"]["visual_tokens"] / 2
    dropping["id"] = "f" * 16
    group = next(group for group in ablation_groups([*records, dropping]) if group.finished == (dropping,))
    assert not group.is_baseline
    assert group.difference is not None
    assert group.difference.mean == pytest.approx(
        parse_outcomes(dropping["accuracy"]["image"]).mean() - ablation_groups(records)[0].accuracy.mean
    )
    assert group.visual_tokens == dropping["model"]["visual_tokens"] / 2


def test_name_differing_settings_unused_settings_are_ignored(records: list[dict[str, Any]]) -> None:
    for record in records[:2]:
        record["config"]["prefusion"]["init"] = "fresh"
    assert {group.settings for group in ablation_groups(records)} == {""}


def test_run_group_outcomes_missing_in_one_seed_are_none(records: list[dict[str, Any]]) -> None:
    blank = ablation_groups(records)[0].outcomes("blank")
    assert blank is not None
    np.testing.assert_array_equal(blank[0], parse_outcomes(records[0]["accuracy"]["blank"]))
    del records[1]["accuracy"]["blank"]
    assert ablation_groups(records)[0].outcomes("blank") is None


@pytest.mark.parametrize("experiment", ["attention", "smol_attention", "swaps"])
def test_compare_with_baselines_drops_groups_of_analyses(records: list[dict[str, Any]], experiment: str) -> None:
    every = ablation_groups(records)
    analysed = {record["id"] for record in every[0].records}
    for record in records:
        if record["id"] in analysed:
            record["experiment"] = experiment
    kept = ablation_groups(records)
    assert len(kept) == len(every) - 1
    assert not analysed & {record["id"] for group in kept for record in group.records}
