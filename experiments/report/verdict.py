"""Verdict on shallow-layer fusion: one rule, applied to every record that removed visual tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from experiments.records.files import Records
from experiments.records.views import Record, is_attention_experiment, parse_outcomes, record_label, record_seed
from experiments.report.statistics import paired_test

REPRODUCES, DOES_NOT_REPRODUCE, UNDECIDED = "reproduces", "does not reproduce", "cannot be told"
CLAIM = "Text takes in the image in the first layers of the language model (LLaVA-Mini, ICLR 2025, section 3)."
CLAIM_RULE = (
    "A model reproduces the claim if both conditions hold. (1) Depth: the model keeps its accuracy if only its first d "
    "layers attend to the visual tokens, and the upper end of d's 95% interval is at most half of the layers. (2) First "
    "block: hiding the visual tokens inside the first block of layers costs more accuracy than hiding them inside any "
    "later block (exact paired tests, one-sided, each p < 0.05). A model does not reproduce the claim if the lower end of "
    "d's interval is above half of the layers, or if some later block costs more than the first (p < 0.05, corrected for "
    "the number of later blocks). In all other cases the verdict cannot be told. Attention is reported but does not "
    "affect the verdict: what a model attends to does not prove what it uses. The headline counts plain LLaVA models (no "
    "compressor, and no pre-fusion, which would give text access to the image before the first layer). It counts those of "
    "an attention experiment if there are any."
)
_ALPHA = 0.05
_ALWAYS_REPORTED = {"removal": True, "knockout": False, "readout": False, "attention": True}
"""Curves that give a fusion depth, and whether the report also names them if they were not measured."""


@dataclass(frozen=True)
class Verdict:
    """The rule's answer for one record, with its reasons as sentences."""

    record: Record
    answer: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Headline:
    """The rule's answer over all plain LLaVA models, with a sentence that explains it."""

    answer: str
    sentence: str

    @property
    def title(self) -> str:
        """The answer as a heading."""
        if self.answer == UNDECIDED:
            return "Whether shallow-layer fusion reproduces here cannot be told"
        return f"Shallow-layer fusion {self.answer} here"


def probed_records(records: Records) -> tuple[Record, ...]:
    """Return the finished records with a probe: attention experiments first, then plain LLaVA, then by name."""
    probed = [r for r in records.finished if any(r.get(key) is not None for key in ("attention", "removal", "fusion"))]
    return tuple(
        sorted(
            probed,
            key=lambda r: (
                not is_attention_experiment(r),
                not _is_plain_llava(r),
                r["name"],
                str(record_seed(r)),
                r["id"],
            ),
        )
    )


def judge_record(record: Record) -> Verdict:
    """Apply `CLAIM_RULE` to one probed record."""
    conditions = (_judge_depth(record), _judge_first_block(record))
    answers = [answer for answer, _ in conditions]
    answer = next((answer for answer in (DOES_NOT_REPRODUCE, UNDECIDED) if answer in answers), REPRODUCES)
    return Verdict(record, answer, (*(reason for _, reason in conditions), _compare_curves(record)))


def make_headline(verdicts: Iterable[Verdict]) -> Headline:
    """Combine the verdicts on plain LLaVA models into one; undecided if they disagree or if there is none."""
    verdicts = list(verdicts)
    plain = [verdict for verdict in verdicts if _is_plain_llava(verdict.record)]
    counted = [verdict for verdict in plain if is_attention_experiment(verdict.record)] or plain
    if not counted:
        reason = "No plain LLaVA was probed" if verdicts else "No finished record holds a probe"
        return Headline(UNDECIDED, f"{reason}.")
    answers = {verdict.answer for verdict in counted}
    if len(answers) > 1:
        tally = ", ".join(
            f"{sum(v.answer == answer for v in counted)} x {answer}"
            for answer in (REPRODUCES, DOES_NOT_REPRODUCE, UNDECIDED)
        )
        return Headline(UNDECIDED, f"The {len(counted)} probed LLaVA models disagree: {tally}.")
    return Headline(answers.pop(), " ".join(_depth_sentence(verdict.record) for verdict in counted))


def reported_curves(record: Record) -> list[str]:
    """Return the curves whose fusion depth the report gives for a record."""
    measured = record.get("fusion") or {}
    return [curve for curve, always in _ALWAYS_REPORTED.items() if always or measured.get(curve) is not None]


def depth_text(record: Record, curve: str) -> str:
    """Describe the fusion depth from one curve.

    Args:
        record: A finished record.
        curve: "removal", "knockout", "readout" or "attention".
    """
    depth = (record.get("fusion") or {}).get(curve)
    if depth is None:
        return "not measured"
    if depth["depth"] is None:
        return f"none: {_why_no_depth(record, curve)}"
    reads = [layer for layer in depth.get("reads") or () if layer != depth["depth"]]
    layers = f", read at layer{'s' * (len(depth['reads']) > 1)} {', '.join(map(str, depth['reads']))}" if reads else ""
    return f"{depth['depth']} of {depth['layers']} layers ({interval_text(depth)}{layers})"


def interval_text(depth: dict) -> str:
    """Describe the interval of a fusion depth with its number of samples."""
    return f"95% CI {depth['low']:g} to {depth['high']:g}, n = {depth['samples']}"


def _is_plain_llava(record: Record) -> bool:
    return record["model"]["compressor"] == "none" and record["model"]["prefusion_layers"] == 0


def _depth_sentence(record: Record) -> str:
    removal, attention = depth_text(record, "removal"), depth_text(record, "attention")
    return f"{record_label(record)}: fusion depth {removal} by removal of visual tokens; {attention} by attention."


def _why_no_depth(record: Record, curve: str) -> str:
    if curve == "attention":
        return "text does not attend to visual tokens"
    if curve == "readout":
        return "the question's states predict the answer no better than its words do"
    blank = record["accuracy"].get("blank")
    if record["model"]["prefusion_layers"] and blank is not None:
        image = parse_outcomes(record["accuracy"]["image"])[None]
        if paired_test(image, parse_outcomes(blank)[None]) < _ALPHA:
            return "the language model's layers need no visual tokens (the image reaches the text before them)"
    return "this model's answers do not depend on the image"


def _judge_depth(record: Record) -> tuple[str, str]:
    """Judge condition (1) of the rule: the fusion depth against half of the layers."""
    depth = (record.get("fusion") or {}).get("removal")
    text = f"Depth from removal: {depth_text(record, 'removal')}."
    if depth is None or depth["depth"] is None:
        return UNDECIDED, text
    half = depth["layers"] / 2
    if depth["high"] <= half:
        return REPRODUCES, f"{text} The interval ends at or below half of the layers ({half:g})."
    if depth["low"] > half:
        return DOES_NOT_REPRODUCE, f"{text} The interval lies above half of the layers ({half:g})."
    return UNDECIDED, f"{text} The interval reaches beyond half of the layers ({half:g})."


def _judge_first_block(record: Record) -> tuple[str, str]:
    """Judge condition (2) of the rule: the first block of layers against every later one."""
    removal = record.get("removal")
    if removal is None:
        return UNDECIDED, "First block: no visual tokens were removed."
    first, *later = [parse_outcomes(run["correct"])[None] for run in removal["inside"]]
    if not later:
        return UNDECIDED, "First block: the model has a single block, so there is no later block to compare with."
    if max(paired_test(block, first, "greater") for block in later) < _ALPHA:
        return REPRODUCES, "First block: hiding the visual tokens there costs more than inside every later block."
    # One later block is enough here, so the smallest p-value is corrected for their number.
    if min(paired_test(first, block, "greater") for block in later) * len(later) < _ALPHA:
        return DOES_NOT_REPRODUCE, "First block: hiding the visual tokens inside a later block costs more."
    return UNDECIDED, "First block: no significant difference from at least one later block."


def _compare_curves(record: Record) -> str:
    """Describe the depths from the other curves, and whether their intervals overlap that of removal."""
    measured = record.get("fusion") or {}
    others = [curve for curve in reported_curves(record) if curve != "removal"]
    text = " ".join(f"Depth from {curve}: {depth_text(record, curve)}." for curve in others)
    depths = {curve: measured.get(curve) for curve in ("removal", *others)}
    located = {curve: depth for curve, depth in depths.items() if depth is not None and depth["depth"] is not None}
    if "removal" not in located or len(located) < 2:
        return text
    low, high = located["removal"]["low"], located["removal"]["high"]
    apart = [curve for curve, depth in located.items() if depth["low"] > high or depth["high"] < low]
    agree = [curve for curve in located if curve != "removal" and curve not in apart]
    parts = (
        [f"{_join_names(agree)} agree{'s' * (len(agree) == 1)} with removal: the intervals overlap"] if agree else []
    )
    if apart:
        verb = f"disagree{'s' * (len(apart) == 1)}"
        parts.append(f"{_join_names(apart)} {verb} with removal: the intervals do not overlap")
    sentence = "; ".join(parts)
    return f"{text} {sentence[0].upper()}{sentence[1:]}."


def _join_names(names: list[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
