from __future__ import annotations

import copy
from typing import Any

import pytest

from experiments.records.files import Records
from experiments.report.verdict import FAILS, REPRODUCES, UNTOLD, depth_text, headline, judge, probed


def hide(record: dict[str, Any], right: list[int]) -> None:
    """Set how many examples stay right with the picture hidden inside each layer (the first `right` of them)."""
    examples = record["data"]["examples"]
    record["removal"]["inside"] = [
        {"layers": [layer], "correct": "1" * count + "0" * (examples - count)} for layer, count in enumerate(right)
    ]


@pytest.mark.parametrize(
    ("low", "high", "inside", "answer"),
    [
        (2, 3, [40, 90, 100, 100, 100, 100], REPRODUCES),
        (2, 4, [40, 90, 100, 100, 100, 100], UNTOLD),
        (4, 5, [40, 90, 100, 100, 100, 100], FAILS),
        (2, 3, [90, 40, 100, 100, 100, 100], FAILS),
        (2, 3, [90, 89, 100, 100, 100, 100], UNTOLD),
        (2, 3, [90], UNTOLD),
    ],
)
def test_the_rule(probed: dict[str, Any], low: int, high: int, inside: list[int], answer: str) -> None:
    probed["fusion"]["removal"] |= {"depth": low, "low": low, "high": high}
    hide(probed, inside)
    assert judge(probed).answer == answer


def test_one_block_among_many_must_survive_the_correction(probed: dict[str, Any]) -> None:
    # 5 against 0 discordant pairs: p = 1/32 one-sided, not below 0.05 after correction for 5 later blocks.
    hide(probed, [95, 90, 100, 100, 100, 100])
    assert judge(probed).answer == UNTOLD
    hide(probed, [95, 90])
    assert judge(probed).answer == FAILS


def test_without_a_gap_there_is_no_depth(probed: dict[str, Any]) -> None:
    probed["fusion"]["removal"] |= {"depth": None, "low": None, "high": None}
    assert judge(probed).answer == UNTOLD
    assert depth_text(probed, "removal") == "none: this model's answers do not depend on the picture"


def test_a_prefused_picture_is_not_called_unused(probed: dict[str, Any]) -> None:
    probed["fusion"]["removal"] |= {"depth": None, "low": None, "high": None}
    probed["model"]["prefusion_layers"] = 2
    assert "the picture reaches the text before them" in depth_text(probed, "removal")
    probed["accuracy"]["blank"] = probed["accuracy"]["image"]
    assert depth_text(probed, "removal") == "none: this model's answers do not depend on the picture"


def test_agreement_is_of_intervals(probed: dict[str, Any]) -> None:
    said = judge(probed).reasons[-1]
    assert said.endswith(
        "Knockout agrees with removal: the intervals overlap; attention disagrees with it: the intervals do not overlap."
    )
    assert "read at layers 1, 2" in said
    probed["fusion"]["attention"] |= {"depth": 3, "low": 3, "high": 4}
    assert judge(probed).reasons[-1].endswith("Knockout and attention agree with removal: the intervals overlap.")
    del probed["fusion"]["knockout"], probed["fusion"]["readout"]
    assert judge(probed).reasons[-1] == (
        "Depth from attention: 3 of 6 layers (95% CI 3 to 4, n = 40). Attention agrees with removal: the intervals overlap."
    )


def test_missing_probes_are_said_to_be_missing(probed: dict[str, Any]) -> None:
    probed["fusion"], probed["removal"] = None, None
    verdict = judge(probed)
    assert verdict.answer == UNTOLD
    assert "not measured" in verdict.reasons[0]
    assert "no visual tokens were removed" in verdict.reasons[1]


def test_headline_counts_plain_llava(probed: dict[str, Any]) -> None:
    yes = judge(probed)
    mini = copy.deepcopy(probed)
    mini["model"]["prefusion_layers"] = 2
    hide(mini, [90, 40])
    assert headline([yes, judge(mini)]).answer == REPRODUCES
    assert "2 of 6 layers (95% CI 2 to 3, n = 120)" in headline([yes]).sentence
    assert headline([judge(mini)]).sentence == "No plain LLaVA was probed."
    no = copy.deepcopy(probed)
    hide(no, [90, 40])
    mixed = headline([yes, judge(no)])
    assert mixed.answer == UNTOLD
    assert "disagree" in mixed.sentence
    no["experiment"] = "ablation"
    assert headline([yes, judge(no)]).answer == REPRODUCES
    assert headline([judge(no)]).answer == FAILS
    assert headline([]).answer == UNTOLD


def test_probed_puts_plain_llava_first(records: list[dict[str, Any]]) -> None:
    mini = copy.deepcopy(records[-1])
    mini["model"]["prefusion_layers"], mini["name"] = 2, "a"
    found = probed(Records((mini, *records[:2], records[-1]), (), (), ()))
    assert [record["name"] for record in found] == ["tiny | LLaVA", "a"]
