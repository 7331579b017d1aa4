"""All claims, and their answers for the runs of a results folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from experiments.report.claims import attention, compression, knockout, onset, prefusion, removal, tokens
from experiments.report.claims.answers import UNDECIDED, Estimate
from experiments.report.claims.claim import Case, Claim
from experiments.report.formatting import setting_text
from experiments.report.run_groups import RunGroup
from experiments.report.training_ends import STILL_IMPROVING, is_still_improving

CLAIMS: tuple[Claim, ...] = (
    attention.ATTENTION_EARLY,
    attention.CONTRIBUTION_EARLY,
    attention.ENTROPY_EARLY,
    removal.FIRST_BLOCK,
    removal.IMAGE_MAY_LEAVE,
    onset.IMAGE_NEEDED_EARLY,
    knockout.TEXT_READS_EARLY,
    prefusion.PREFUSION_RESCUES,
    prefusion.EACH_LAYER_HELPS,
    tokens.TOKENS_WITHOUT,
    tokens.TOKENS_WITH,
    tokens.TOKENS_MATTER_LESS,
    compression.QUERY_BEATS_AVERAGE,
    prefusion.OUTSIDE_BEATS_INSIDE,
)
"""The claims in the order of the paper."""


@dataclass(frozen=True)
class Finding:
    """A claim with its estimate on one case.

    Args:
        claim: The claim.
        case: The measurements.
        model: Name of the model, with the settings that set this case apart from the claim's other cases.
        question_type: Type of the questions, "" for all.
        estimate: The statistic with its answer.
    """

    claim: Claim
    case: Case
    model: str
    question_type: str
    estimate: Estimate


def judge_claims(groups: Sequence[RunGroup]) -> tuple[Finding, ...]:
    """Test every claim on all cases that some runs hold.

    Args:
        groups: The runs of a results folder.

    Returns:
        A finding for each claim and case, in the order of `CLAIMS`. A claim without a case has none.
    """
    return tuple(finding for claim in CLAIMS for finding in _judge_claim(claim, groups))


def judge_by_question_type(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Test the claims again on the questions of each type, where there are several.

    Args:
        findings: The findings over all questions.
    """
    return tuple(found for finding in findings for found in _judge_types(finding))


def _judge_claim(claim: Claim, groups: Sequence[RunGroup]) -> Iterator[Finding]:
    # Cells without pre-fusion belong to several families, which may give the same case.
    cases = {tuple(sorted(record["id"] for record in case.records)): case for case in claim.find_cases(groups)}
    for case, model in zip(cases.values(), _models(list(cases.values())), strict=True):
        yield Finding(claim, case, model, "", _estimate(case, np.ones(len(_question_types(case)), dtype=bool)))


def _judge_types(finding: Finding) -> Iterator[Finding]:
    types = _question_types(finding.case)
    names = sorted(set(types))
    if len(names) > 1:
        for name in names:
            yield replace(finding, question_type=name, estimate=_estimate(finding.case, types == name))


def _question_types(case: Case) -> np.ndarray:
    """Return the type of each question that the case measured; attention is measured on the first ones."""
    return np.asarray(case.records[0]["data"]["kinds"])[: case.statistic.questions]


def _estimate(case: Case, selected: np.ndarray) -> Estimate:
    estimate = case.statistic.estimate(selected)
    if any(map(is_still_improving, case.records)):
        return replace(estimate, answer=UNDECIDED, reason=STILL_IMPROVING)
    return estimate


def _models(cases: Sequence[Case]) -> list[str]:
    """Return the model's name of each case, with the settings in which the cases differ."""
    varying: dict[tuple[int, ...], str] = {}
    for key in sorted({key for case in cases for key in case.settings} - {"model.name"}):
        values = [str(case.settings.get(key)) for case in cases]
        # Of settings that distinguish the same cases, one is enough.
        varying.setdefault(tuple(map(values.index, values)), key)
    varying.pop((0,) * len(cases), None)
    return [", ".join([_name(case), *_texts(case, varying.values())]) for case in cases]


def _name(case: Case) -> str:
    return str((case.records[0]["config"].get("model") or {}).get("name") or case.records[0]["model"]["label"])


def _texts(case: Case, keys: Iterable[str]) -> list[str]:
    return [setting_text(key, case.settings[key]) for key in keys if key in case.settings]
