"""Tests of the paper's claims on records with planted answers, and of their answers where nothing is true."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from experiments.records.files import Records
from experiments.report.claims.answers import DOES_NOT_HOLD, HOLDS, UNDECIDED
from experiments.report.claims.registry import CLAIMS, Finding, judge_by_question_type, judge_claims
from experiments.report.claims.shares import Share
from experiments.report.claims.steps import Step, Steps
from experiments.report.run_groups import group_runs

Record = dict[str, Any]
QUESTIONS = 200
SECOND_HALF = np.arange(QUESTIONS) >= QUESTIONS // 2


def judge(records: list[Record]) -> dict[str, Finding]:
    return {finding.claim.key: finding for finding in judge_claims(group_runs(Records(tuple(records), (), (), ())))}


def answers(records: list[Record]) -> dict[str, str]:
    return {key: finding.estimate.answer for key, finding in judge(records).items()}


def digits(right: np.ndarray | float) -> str:
    """Return outcomes of 200 questions: those given, or right in the first questions up to a share."""
    mask = right if isinstance(right, np.ndarray) else np.arange(QUESTIONS) < round(right * QUESTIONS)
    return "".join("1" if entry else "0" for entry in mask)


def record(identity: int, compressor: str, size: int, layers: int, right: float, seed: int = 0, **more: Any) -> Record:
    """Make a finished record of one cell, right in the given share of questions; `more` are settings."""
    config = {
        "seed": seed,
        "model": {"name": "made"},
        "compressor": {"name": compressor, "size": size},
        "prefusion": {"layers": layers, "location": more.pop("location", "outside"), "init": "fresh"},
        "train": {"max_steps": 60, "until": "max_steps", **more},
    }
    if not layers:
        config["prefusion"]["init"] = "language_model"  # has no effect, so rows may differ in it
    model = {"label": "made", "layers": 6, "visual_tokens": 9, "prefusion_layers": layers, "compressor": compressor}
    data = {"name": "made", "fingerprint": "f", "examples": QUESTIONS, "kinds": ["a"] * (QUESTIONS // 2) * 2}
    return {
        "id": f"{identity:016x}",
        "experiment": "ablation",
        "name": "made",
        "status": "finished",
        "config": config,
        "model": model,
        "data": data,
        "accuracy": {"image": digits(right)},
        "provenance": {},
    }


def probed(reads: list[int], attends: list[float], entropy: list[float], right: float = 0.9) -> Record:
    """Make the record of a model of 6 layers whose answer needs the image in all layers of `reads`, counted from 1."""
    made = record(99, "none", 1, 0, right)
    made["experiment"] = "attention"
    rng = np.random.default_rng(3)
    blind = 0.3 if reads else right

    def outcome(hidden: range) -> str:
        lost = sum(read - 1 in hidden for read in reads)
        return digits(right - (right - blind) * lost / max(len(reads), 1))

    def run(hidden: range) -> dict[str, Any]:
        return {"layers": list(hidden), "correct": outcome(hidden)}

    noise = rng.normal(0, 0.01, (2, 6, 100))
    made["attention"] = {
        "pairs": [["instruction", "vision"]],
        "samples": 100,
        "mass": [(np.asarray(attends)[:, None] + noise[0]).tolist()],
        "entropy": [(np.asarray(entropy)[:, None] + noise[1]).tolist()],
    }
    single = [range(layer, layer + 1) for layer in range(6)]
    made["removal"] = {"inside": list(map(run, single)), "onward": [run(range(first, 6)) for first in range(7)]}
    made["contribution"] = made["attention"] | {"share": made["attention"]["mass"]}
    made["onset"] = {"upto": [run(range(end)) for end in range(7)]}
    made["knockout"] = {"width": 1, "windows": list(map(run, [range(0), *single]))}
    return made


EARLY, LATE, EVEN = [0.6, 0.5, 0.3, 0.2, 0.1, 0.1], [0.1, 0.1, 0.2, 0.3, 0.5, 0.6], [0.3] * 6


@pytest.mark.parametrize(
    ("reads", "first_block", "half"),
    [
        ([1], HOLDS, HOLDS),
        ([3], DOES_NOT_HOLD, HOLDS),
        ([4], DOES_NOT_HOLD, DOES_NOT_HOLD),
        ([6], DOES_NOT_HOLD, DOES_NOT_HOLD),
        ([1, 3], UNDECIDED, HOLDS),
        ([1, 6], UNDECIDED, DOES_NOT_HOLD),
        ([], UNDECIDED, UNDECIDED),
    ],
)
def test_removal_and_knockout_claims_find_the_planted_layers(reads: list[int], first_block: str, half: str) -> None:
    found = answers([probed(reads, EVEN, EVEN)])
    assert found["first_block"] == first_block
    assert found["image_may_leave"] == found["text_reads_early"] == found["image_needed_early"] == half


NEED_IMAGE = ("first_block", "image_may_leave", "image_needed_early", "text_reads_early")


@pytest.mark.parametrize("reads", [[1], [6]])
def test_claims_on_interventions_with_answers_as_good_without_the_own_image_cannot_be_told(reads: list[int]) -> None:
    made = probed([*reads], EVEN, EVEN)
    assert UNDECIDED not in {answers([made])[key] for key in NEED_IMAGE}
    made["accuracy"]["shuffled"] = digits(0.5)
    assert UNDECIDED not in {answers([made])[key] for key in NEED_IMAGE}
    made["accuracy"]["shuffled"] = made["accuracy"]["image"][::-1]  # as many right answers, to other questions
    estimates = [judge([made])[key].estimate for key in NEED_IMAGE]
    assert {(estimate.answer, estimate.reason) for estimate in estimates} == {
        (UNDECIDED, "it is not shown that the answers need the image")
    }


def test_first_block_of_a_model_that_answers_as_well_without_the_image_cannot_be_told() -> None:
    """Hiding the image in a later block costs answers, hiding it everywhere gives them back."""
    made = probed([6], EVEN, EVEN)
    made["removal"]["onward"][0]["correct"] = made["accuracy"]["image"]
    estimate = judge([made])["first_block"].estimate
    assert (estimate.answer, estimate.reason) == (UNDECIDED, "it is not shown that the answers need the image")


@pytest.mark.parametrize(("curve", "answer"), [(EARLY, HOLDS), (LATE, DOES_NOT_HOLD), (EVEN, DOES_NOT_HOLD)])
def test_attention_claims_compare_first_and_last_third(curve: list[float], answer: str) -> None:
    found = judge([probed([1], curve, curve)])
    keys = ("attention_early", "contribution_early", "entropy_early")
    assert {found[key].estimate.answer for key in keys} == {answer}
    expected = sum(curve[:2]) / (sum(curve[:2]) + sum(curve[-2:]))
    assert found["attention_early"].estimate.value == pytest.approx(expected, abs=0.01)


def test_attention_claim_without_attention_cannot_be_told() -> None:
    estimate = judge([probed([1], [0.0] * 6, EVEN)])["attention_early"].estimate
    assert (estimate.answer, np.isnan(estimate.value)) == (UNDECIDED, True)


def test_claims_by_question_type_use_the_questions_of_the_type() -> None:
    made = probed([1], EVEN, EVEN)
    made["data"]["kinds"] = np.where(SECOND_HALF, "late", "early").tolist()
    for run in [*made["removal"]["onward"], *made["removal"]["inside"]]:
        run["correct"] = digits(SECOND_HALF | (0 not in run["layers"]))
    made["accuracy"]["image"] = digits(1.0)
    findings = judge_claims(group_runs(Records((made,), (), (), ())))
    by_type = {(f.claim.key, f.question_type): f.estimate for f in judge_by_question_type(findings)}
    assert by_type["first_block", "early"].answer == HOLDS
    assert by_type["first_block", "early"].questions == QUESTIONS // 2
    assert by_type["first_block", "late"].answer == UNDECIDED
    assert by_type["image_may_leave", "late"].reason == "it is not shown that the answers need the image"


def rows(accuracies: dict[tuple[str, int, int, str], float], **more: Any) -> list[Record]:
    return [
        record(1000 * seed + number, compressor, size, layers, right, seed, location=location, **more)
        for number, ((compressor, size, layers, location), right) in enumerate(accuracies.items())
        for seed in (0, 1)
    ]


PAPER = {
    ("query", 1, 0, "outside"): 0.30,
    ("query", 4, 0, "outside"): 0.60,
    ("query", 1, 1, "outside"): 0.50,
    ("query", 1, 2, "outside"): 0.70,
    ("query", 4, 2, "outside"): 0.80,
    ("average", 1, 2, "outside"): 0.60,
    ("average", 4, 2, "outside"): 0.70,
    ("query", 1, 2, "inside"): 0.55,
}
ROW_CLAIMS = [claim.key for claim in CLAIMS if claim.source.startswith("Table")]


def test_row_claims_of_the_paper_hold_and_fail_when_reversed() -> None:
    found = judge(rows(PAPER))
    assert {key: finding.estimate.answer for key, finding in found.items()} == dict.fromkeys(ROW_CLAIMS, HOLDS)
    # The gain of more tokens is 30 points without and 10 points with pre-fusion.
    assert found["tokens_matter_less"].estimate.value == pytest.approx(0.2)
    assert found["each_layer_helps"].estimate.value == pytest.approx(0.2)
    assert found["query_beats_average"].estimate.value == pytest.approx(0.1)
    reversed_rows = answers(rows({cell: 1 - right for cell, right in PAPER.items()}))
    assert reversed_rows == dict.fromkeys(ROW_CLAIMS, DOES_NOT_HOLD)


def test_row_claims_of_equal_rows_cannot_be_told() -> None:
    estimates = [finding.estimate for finding in judge(rows(dict.fromkeys(PAPER, 0.5))).values()]
    assert {estimate.answer for estimate in estimates} == {UNDECIDED}
    # 8 discordant questions in the mean are needed, however narrow the interval is.
    assert {estimate.smallest_effect for estimate in estimates} == {7.9 / (2 * QUESTIONS)}


def test_row_claims_each_layer_needs_every_step() -> None:
    flat = {**PAPER, ("query", 1, 1, "outside"): 0.70}
    undecided = judge(rows(flat))["each_layer_helps"].estimate
    assert (undecided.answer, undecided.value) == (UNDECIDED, pytest.approx(0.0))
    worse = {**PAPER, ("query", 1, 1, "outside"): 0.85}
    found = answers(rows(worse))
    assert (found["each_layer_helps"], found["prefusion_rescues"]) == (DOES_NOT_HOLD, HOLDS)


def test_claim_that_does_not_hold_shows_the_step_that_decides() -> None:
    # The second step is the most negative, but its questions disagree so much that it decides nothing.
    rng = np.random.default_rng(0)
    better = np.ones((1, 400), int)
    slightly = better.copy()
    slightly[0, :20] = 0
    noisy = [(rng.random((1, 400)) < right).astype(int) for right in (0.45, 0.52)]
    steps = Steps([Step((slightly,), (better,)), Step((noisy[0],), (noisy[1],))])
    estimate = steps.estimate(np.ones(400, bool))
    assert estimate.answer == DOES_NOT_HOLD
    assert estimate.value == pytest.approx(-0.05)
    assert estimate.high < 0


def test_family_with_two_runs_of_a_cell_uses_the_one_with_more_seeds() -> None:
    newer = record(9000, "query", 1, 0, 0.70)
    newer["config"]["prefusion"]["init"] = "identity"  # without effect: it has no pre-fusion layers
    newer["provenance"]["started"] = "2030-01-01T00:00:00"
    found = judge([*rows(PAPER), newer])["prefusion_rescues"].estimate
    assert (found.value, found.seeds) == (pytest.approx(0.4), 2)


def test_claims_about_very_few_questions_of_a_type_say_so() -> None:
    made = probed([1], EVEN, EVEN)
    made["data"]["kinds"] = ["rare"] * 5 + ["common"] * (QUESTIONS - 5)
    findings = judge_claims(group_runs(Records((made,), (), (), ())))
    by_type = {(f.claim.key, f.question_type): f.estimate for f in judge_by_question_type(findings)}
    assert by_type["first_block", "rare"].reason == "too few questions"


def test_row_claims_do_not_compare_rows_trained_differently() -> None:
    shorter = [cell for cell in PAPER if cell[2] == 0]
    mixed = rows({c: PAPER[c] for c in PAPER if c not in shorter}) + [
        made | {"id": f"a{made['id'][1:]}"} for made in rows({c: PAPER[c] for c in shorter}, learning_rate=1.0)
    ]
    assert {"prefusion_rescues", "each_layer_helps", "tokens_matter_less"}.isdisjoint(answers(mixed))


def test_row_claims_of_rows_still_improving_cannot_be_told() -> None:
    made = rows(PAPER, until="plateau")
    for entry in made:
        entry["train"] = {"log": [], "steps": 60, "stopped": "max_steps"}
    found = judge(made)["prefusion_rescues"].estimate
    assert (found.answer, found.reason) == (UNDECIDED, "still improving")


def test_smallest_effect_is_found_in_four_of_five_samples() -> None:
    """The true difference is the smallest effect of a sample of independent outcomes at 60 against 50%."""
    rng = np.random.default_rng(0)
    everything = np.ones(400, dtype=bool)

    def draw(difference: float) -> Steps:
        low, high = (rng.random(400) < right for right in (0.5, 0.5 + difference))
        return Steps([Step((high[None].astype(np.uint8),), (low[None].astype(np.uint8),))])

    effect = float(np.mean([draw(0.1).estimate(everything).smallest_effect for _ in range(20)]))
    found = [draw(effect).estimate(everything).answer == HOLDS for _ in range(200)]
    assert 0.7 < np.mean(found) < 0.9


def null_share(rng: np.random.Generator) -> Share:
    """Outcomes of a model that keeps exactly 90% of the image's worth: 84 of 30 to 90%."""
    difficulty = rng.random(300)
    none, half, whole = (difficulty < right for right in (0.3, 0.84, 0.9))
    return Share((half * 1.0 - none)[None], (whole * 1.0 - none)[None], 0.9, 0.0, "")


def null_attention(rng: np.random.Generator) -> Share:
    first, last = (mean * rng.gamma(4, 0.25, (1, 300)) for mean in (0.525, 0.475))
    return Share(first, first + last, 0.525, 0.002, "", least=0.0)


def null_rows(rng: np.random.Generator) -> Steps:
    difficulty = rng.random(300)
    rows = [(difficulty + rng.normal(0, 0.15, (3, 300)) < 0.7).astype(np.uint8) for _ in range(2)]
    return Steps([Step((rows[0],), (rows[1],))])


@pytest.mark.parametrize("draw", [null_share, null_attention, null_rows])
def test_claims_on_their_line_hold_in_at_most_5_percent_of_draws(
    draw: Callable[[np.random.Generator], Share | Steps],
) -> None:
    found = [draw(np.random.default_rng(seed)).estimate(np.ones(300, dtype=bool)).answer for seed in range(200)]
    assert found.count(HOLDS) <= 10
    assert found.count(DOES_NOT_HOLD) <= 10
