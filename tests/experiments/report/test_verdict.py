"""Tests of the verdict on shallow-layer fusion."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from experiments.records.files import Records
from experiments.report.verdict import (
    DOES_NOT_REPRODUCE,
    REPRODUCES,
    UNDECIDED,
    depth_text,
    judge_record,
    make_headline,
    probed_records,
)


def hide(record: dict[str, Any], right: list[int]) -> None:
    """Set how many examples stay right with vision hidden inside each layer; the first `right` of them do."""
    examples = record["data"]["examples"]
    record["removal"]["inside"] = [
        {"layers": [layer], "correct": "1" * count + "0" * (examples - count)} for layer, count in enumerate(right)
    ]


@pytest.mark.parametrize(
    ("low", "high", "inside", "answer"),
    [
        (2, 3, [40, 90, 100, 100, 100, 100], REPRODUCES),
        (2, 4, [40, 90, 100, 100, 100, 100], UNDECIDED),
        (4, 5, [40, 90, 100, 100, 100, 100], DOES_NOT_REPRODUCE),
        (2, 3, [90, 40, 100, 100, 100, 100], DOES_NOT_REPRODUCE),
        (2, 3, [90, 89, 100, 100, 100, 100], UNDECIDED),
        (2, 3, [90], UNDECIDED),
    ],
)
def test_judge_record_applies_both_conditions(
    probed: dict[str, Any], low: int, high: int, inside: list[int], answer: str
) -> None:
    probed["fusion"]["removal"] |= {"depth": low, "low": low, "high": high}
    hide(probed, inside)
    assert judge_record(probed).answer == answer


def test_judge_record_costly_later_block_is_corrected_for_their_number(probed: dict[str, Any]) -> None:
    # 5 against 0 discordant pairs: p = 1/32 one-sided, not below 0.05 after correction for 5 later blocks.
    hide(probed, [95, 90, 100, 100, 100, 100])
    assert judge_record(probed).answer == UNDECIDED
    hide(probed, [95, 90])
    assert judge_record(probed).answer == DOES_NOT_REPRODUCE


def test_depth_text_without_depth_gives_the_reason(probed: dict[str, Any]) -> None:
    probed["fusion"]["removal"] |= {"depth": None, "low": None, "high": None}
    assert judge_record(probed).answer == UNDECIDED
    assert depth_text(probed, "removal") == "none: this model's answers do not depend on the image"


def test_depth_text_prefusion_model_that_uses_the_image_says_so(probed: dict[str, Any]) -> None:
    probed["fusion"]["removal"] |= {"depth": None, "low": None, "high": None}
    probed["model"]["prefusion_layers"] = 2
    assert "the image reaches the text before them" in depth_text(probed, "removal")
    probed["accuracy"]["blank"] = probed["accuracy"]["image"]
    assert depth_text(probed, "removal") == "none: this model's answers do not depend on the image"


def test_judge_record_curves_agree_if_intervals_overlap(probed: dict[str, Any]) -> None:
    comparison = judge_record(probed).reasons[-1]
    assert comparison.endswith(
        "Knockout agrees with removal: the intervals overlap; attention disagrees with removal: the intervals do not overlap."
    )
    assert "read at layers 1, 2" in comparison
    probed["fusion"]["attention"] |= {"depth": 3, "low": 3, "high": 4}
    assert (
        judge_record(probed).reasons[-1].endswith("Knockout and attention agree with removal: the intervals overlap.")
    )
    del probed["fusion"]["knockout"], probed["fusion"]["readout"]
    assert judge_record(probed).reasons[-1] == (
        "Depth from attention: 3 of 6 layers (95% CI 3 to 4, n = 40). Attention agrees with removal: the intervals overlap."
    )


def test_judge_record_missing_probes_are_named(probed: dict[str, Any]) -> None:
    probed["fusion"], probed["removal"] = None, None
    verdict = judge_record(probed)
    assert verdict.answer == UNDECIDED
    assert "not measured" in verdict.reasons[0]
    assert "no visual tokens were removed" in verdict.reasons[1]


def test_make_headline_counts_plain_llava(probed: dict[str, Any]) -> None:
    yes = judge_record(probed)
    mini = copy.deepcopy(probed)
    mini["model"]["prefusion_layers"] = 2
    hide(mini, [90, 40])
    assert make_headline([yes, judge_record(mini)]).answer == REPRODUCES
    assert "2 of 6 layers (95% CI 2 to 3, n = 120)" in make_headline([yes]).sentence
    assert make_headline([judge_record(mini)]).sentence == "No plain LLaVA was probed."
    no = copy.deepcopy(probed)
    hide(no, [90, 40])
    mixed = make_headline([yes, judge_record(no)])
    assert mixed.answer == UNDECIDED
    assert "disagree" in mixed.sentence
    no["experiment"] = "ablation"
    assert make_headline([yes, judge_record(no)]).answer == REPRODUCES
    assert make_headline([judge_record(no)]).answer == DOES_NOT_REPRODUCE
    assert make_headline([]).answer == UNDECIDED


def test_probed_records_puts_plain_llava_first(records: list[dict[str, Any]]) -> None:
    mini = copy.deepcopy(records[-1])
    mini["model"]["prefusion_layers"], mini["name"] = 2, "a"
    found = probed_records(Records((mini, *records[:2], records[-1]), (), (), ()))
    assert [record["name"] for record in found] == ["tiny | LLaVA", "a"]
