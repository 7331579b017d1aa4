"""The table of words of patches against resampled ratios and known counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from experiments.report.tables.patch_words import patch_words_tables, share_of_patches


def test_share_of_patches_equals_a_ratio_over_resampled_images() -> None:
    generator = np.random.default_rng(0)
    patches = generator.integers(1, 9, 200)
    right = generator.binomial(patches, 0.3)
    draws = generator.integers(200, size=(20_000, 200))
    low, high = np.quantile(right[draws].sum(1) / patches[draws].sum(1), [0.025, 0.975])
    interval = share_of_patches(right.astype(float), patches.astype(float))
    assert interval.mean == right.sum() / patches.sum()
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=3e-3)


def test_share_of_patches_skips_draws_without_a_patch() -> None:
    interval = share_of_patches(np.array([1.0, 0, 0]), np.array([2.0, 0, 0]))
    assert interval == (0.5, 0.5, 0.5)


def test_patch_words_tables_hold_shares_and_chance_of_each_depth(probed: dict[str, Any]) -> None:
    depths = [
        {"logit": {"right": [k, 0], "chance": 0.25}, "contextual": {"right": [2, 1], "chance": 0.1}} for k in range(2)
    ]
    part = {"images": 2, "patches": [3, 1], "corpus_words": 5, "depths": depths}
    (table,) = patch_words_tables([probed, probed | {"patch_words": part}])
    assert table.data["logit"].tolist() == [0, 0.25]
    assert table.data["contextual"].tolist() == [0.75, 0.75]
    assert table.data["difference"].tolist() == [0.75, 0.5]
    assert table.data["patches"].tolist() == [4, 4]
    assert table.text["Chance (%)"].tolist() == ["25.0", "25.0"]
    assert table.text["Its chance (%)"].tolist() == ["10.0", "10.0"]


def test_patch_words_tables_without_such_a_record_are_none(probed: dict[str, Any]) -> None:
    assert patch_words_tables([probed]) == ()
