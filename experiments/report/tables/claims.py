"""Claims tables: the paper's claims with their statistics and answers, over all questions and by question type."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from experiments.report.claims.answers import DOES_NOT_HOLD, HOLDS, UNDECIDED, Estimate
from experiments.report.claims.claim import Claim
from experiments.report.claims.registry import CLAIMS, Finding
from experiments.report.formatting import NONE, format_signed
from experiments.report.tables.table import Table, data_frame

_COLUMNS = (
    *("claim", "source", "statement", "model", "compared", "question_type", "unit", "value", "low", "high", "line"),
    *("questions", "seeds", "smallest_effect", "answer", "reason", "records"),
)
_NOTES = (
    "Shares are in percent, differences of accuracy in percentage points. A claim holds if the 95% interval over questions "
    "and seeds lies above the line and a test without bootstrap agrees; it does not hold if both lie below; else it cannot "
    "be told. Smallest effect: distance from the line that this n shows with 80% power. Formulas, and what each claim "
    "cannot see: docs/claims.md.",
)


def claims_table(findings: Sequence[Finding]) -> Table:
    """Build the table of all claims over all questions.

    Args:
        findings: The claims' answers, as `judge_claims` returns them.
    """
    missing = [claim for claim in CLAIMS if claim.key not in {finding.claim.key for finding in findings}]
    names = "; ".join(f"{claim.statement.lower()} ({claim.source})" for claim in missing)
    notes = (*_NOTES, *([f"Not measured by these records: {names}."] if missing else []))
    caption = "Claims of the LLaVA-Mini paper, tested on these records."
    return _make_table("claims", caption, findings, ("Paper", "Measured on"), notes)


def claims_by_question_type_table(findings: Sequence[Finding]) -> Table:
    """Build the table of all claims on the questions of each type.

    Args:
        findings: The claims' answers, as `judge_by_question_type` returns them.
    """
    caption = "The paper's claims by question type."
    notes = ("As in the table of claims. Answers are not corrected for the number of types.",)
    return _make_table("claims_by_question_type", caption, findings, ("Measured on", "Questions"), notes)


def summarize(findings: Sequence[Finding]) -> str:
    """Return one sentence on how many tests of the claims have which answer.

    Args:
        findings: The claims' answers over all questions.
    """
    if not findings:
        return "These records hold no measurement that a claim of the paper could be tested on."
    answers = [finding.estimate.answer for finding in findings]
    counted = ((answers.count(answer), texts) for answer, texts in _COUNTED.items() if answer in answers)
    counts = [f"{count} {texts[count > 1]}" for count, texts in counted]
    listed = f"{', '.join(counts[:-1])} and {counts[-1]}" if len(counts) > 1 else counts[0]
    return f"Of {len(findings)} tests of the paper's claims on these records, {listed}."


def format_value(finding: Finding) -> str:
    """Format a claim's statistic with its interval: "59.8% [58.9, 60.8]" or "+3.6 [\u22120.6, 7.7]"."""
    value, low, high = (100 * number for number in _statistic(finding.estimate))
    if math.isnan(value):
        return finding.estimate.reason
    first = f"{format_signed(value, False)}%" if finding.claim.unit == "share" else format_signed(value)
    return f"{first} [{_minus(low)}, {_minus(high)}]"


def format_answer(finding: Finding) -> str:
    """Format a claim's answer, with the reason if its statistic is not judged."""
    estimate = finding.estimate
    return (
        f"{estimate.answer} ({estimate.reason})"
        if estimate.reason and not math.isnan(estimate.value)
        else estimate.answer
    )


_COUNTED = {
    HOLDS: ("holds", "hold"),
    DOES_NOT_HOLD: ("does not hold", "do not hold"),
    UNDECIDED: ("cannot be told", "cannot be told"),
}
"""Each answer's text for one claim and for several."""


def _make_table(
    name: str, caption: str, findings: Sequence[Finding], columns: Sequence[str], notes: tuple[str, ...]
) -> Table:
    text = [_text(finding) for finding in findings]
    kept = ["Claim", *columns, "Value [95% CI]", "Line", "n", "Smallest effect", "Answer"]
    frame = pd.DataFrame(text, columns=list(_TEXT_COLUMNS))[kept]
    data = data_frame([_data(finding) for finding in findings], _COLUMNS)
    bold = frozenset(
        (number, "Answer") for number, finding in enumerate(findings) if finding.estimate.answer != UNDECIDED
    )
    return Table(name, caption, data, frame, ("Value [95% CI]", "Line", "n", "Smallest effect"), notes, bold)


_TEXT_COLUMNS = (
    *("Claim", "Paper", "Measured on", "Questions", "Value [95% CI]", "Line", "n", "Smallest effect", "Answer"),
)


def _text(finding: Finding) -> dict[str, str]:
    estimate = finding.estimate
    n = f"{estimate.questions:,}" + (f" \u00d7 {estimate.seeds} seeds" if estimate.seeds > 1 else "")
    effect = estimate.smallest_effect
    return {
        "Claim": finding.claim.statement,
        "Paper": finding.claim.source,
        "Measured on": f"{finding.model}; {finding.case.detail}",
        "Questions": finding.question_type or NONE,
        "Value [95% CI]": format_value(finding),
        "Line": _line(finding.claim),
        "n": n,
        "Smallest effect": NONE if math.isnan(effect) else format_signed(100 * effect, False),
        "Answer": format_answer(finding),
    }


def _data(finding: Finding) -> dict[str, Any]:
    claim, estimate = finding.claim, finding.estimate
    value, low, high = _statistic(estimate)
    values = (
        *(
            claim.key,
            claim.source,
            claim.statement,
            finding.model,
            finding.case.detail,
            finding.question_type,
            claim.unit,
        ),
        *(value, low, high, claim.line, estimate.questions, estimate.seeds, estimate.smallest_effect),
        *(estimate.answer, estimate.reason, " ".join(record["id"] for record in finding.case.records)),
    )
    return dict(zip(_COLUMNS, values, strict=True))


def _statistic(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high


def _line(claim: Claim) -> str:
    return f"{100 * claim.line:g}%" if claim.unit == "share" else "0"


def _minus(value: float) -> str:
    return format_signed(value, False).replace("-", "\u2212")
