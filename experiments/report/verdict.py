"""Does shallow-layer fusion reproduce? One rule, applied to every record that removed visual tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from experiments.records.files import Records
from experiments.records.views import Record, describe, of_attention, outcomes, seed
from experiments.report.statistics import paired_test

REPRODUCES, FAILS, UNTOLD = "reproduces", "does not reproduce", "cannot be told"
CLAIM = "Text takes in the picture in the first layers of the language model (LLaVA-Mini, ICLR 2025, section 3)."
RULE = (
    "A model reproduces the claim if both hold. (1) Depth: it needs to see the visual tokens only in its first d "
    "layers to keep its accuracy, and the upper end of d's 95% interval is at most half of the layers. (2) First "
    "block: hiding the visual tokens inside the first block of layers alone costs more accuracy than inside every "
    "later block (exact paired tests, one-sided, each p < 0.05). It does not reproduce it if the lower end of d's "
    "interval is above half of the layers, or if some later block costs more than the first (p < 0.05, corrected for "
    "the number of later blocks). Otherwise it cannot be told. Attention is reported beside it and decides nothing: "
    "where a model looks is no proof of what it uses. The headline counts plain LLaVA (no compressor; no pre-fusion, "
    "which would show text the picture before the first layer), of an attention experiment where one was run."
)
_ALPHA = 0.05
_KINDS = {"removal": True, "knockout": False, "readout": False, "attention": True}
"""Curves that give a fusion depth, and whether a report says so where one was not measured."""


@dataclass(frozen=True)
class Verdict:
    """The rule's answer for one record, with its reasons as sentences."""

    record: Record
    answer: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Headline:
    """The rule's answer over all plain LLaVAs, in a sentence."""

    answer: str
    sentence: str

    @property
    def title(self) -> str:
        """The answer as a heading."""
        if self.answer == UNTOLD:
            return "Whether shallow-layer fusion reproduces here cannot be told"
        return f"Shallow-layer fusion {self.answer} here"


def probed(records: Records) -> tuple[Record, ...]:
    """Finished records with a probe: the attention experiment first, plain LLaVA before others, then by name."""
    found = [r for r in records.finished if any(r.get(key) is not None for key in ("attention", "removal", "fusion"))]
    return tuple(sorted(found, key=lambda r: (not of_attention(r), not _plain(r), r["name"], str(seed(r)), r["id"])))


def judge(record: Record) -> Verdict:
    """Apply the rule to one record."""
    conditions = (_depth(record), _first_block(record))
    answers = [answer for answer, _ in conditions]
    answer = next((answer for answer in (FAILS, UNTOLD) if answer in answers), REPRODUCES)
    return Verdict(record, answer, (*(reason for _, reason in conditions), _agreement(record)))


def headline(verdicts: Iterable[Verdict]) -> Headline:
    """One answer over the plain LLaVAs; "cannot be told" where they disagree or there is none."""
    verdicts = list(verdicts)
    plain = [verdict for verdict in verdicts if _plain(verdict.record)]
    counted = [verdict for verdict in plain if of_attention(verdict.record)] or plain
    if not counted:
        reason = "No plain LLaVA was probed" if verdicts else "No finished record holds a probe"
        return Headline(UNTOLD, f"{reason}.")
    answers = {verdict.answer for verdict in counted}
    if len(answers) > 1:
        tally = ", ".join(f"{sum(v.answer == a for v in counted)} x {a}" for a in (REPRODUCES, FAILS, UNTOLD))
        return Headline(UNTOLD, f"The {len(counted)} probed LLaVAs disagree: {tally}.")
    return Headline(answers.pop(), " ".join(_sentence(verdict.record) for verdict in counted))


def curves_of(record: Record) -> list[str]:
    """The curves whose fusion depth a report gives for this record."""
    measured = record.get("fusion") or {}
    return [kind for kind, always in _KINDS.items() if always or measured.get(kind) is not None]


def depth_text(record: Record, kind: str) -> str:
    """The fusion depth of one kind ("removal", "knockout", "readout" or "attention") in words."""
    depth = (record.get("fusion") or {}).get(kind)
    if depth is None:
        return "not measured"
    if depth["depth"] is None:
        return f"none: {_no_depth(record, kind)}"
    reads = [layer for layer in depth.get("reads") or () if layer != depth["depth"]]
    named = f", read at layer{'s' * (len(depth['reads']) > 1)} {', '.join(map(str, depth['reads']))}" if reads else ""
    return f"{depth['depth']} of {depth['layers']} layers ({interval_text(depth)}{named})"


def interval_text(depth: dict) -> str:
    """The interval of a fusion depth with its sample count."""
    return f"95% CI {depth['low']:g} to {depth['high']:g}, n = {depth['samples']}"


def _plain(record: Record) -> bool:
    return record["model"]["compressor"] == "none" and record["model"]["prefusion_layers"] == 0


def _sentence(record: Record) -> str:
    removal, attention = depth_text(record, "removal"), depth_text(record, "attention")
    return f"{describe(record)}: fusion depth {removal} by removal of visual tokens; {attention} by attention."


def _no_depth(record: Record, kind: str) -> str:
    if kind == "attention":
        return "text does not attend to visual tokens"
    if kind == "readout":
        return "the answer cannot be read off the question's states better than off its words"
    blank = record["accuracy"].get("blank")
    if record["model"]["prefusion_layers"] and blank is not None:
        image = outcomes(record["accuracy"]["image"])[None]
        if paired_test(image, outcomes(blank)[None]) < _ALPHA:
            return "the language model's layers need no visual tokens (the picture reaches the text before them)"
    return "this model's answers do not depend on the picture"


def _depth(record: Record) -> tuple[str, str]:
    depth = (record.get("fusion") or {}).get("removal")
    text = f"Depth from removal: {depth_text(record, 'removal')}."
    if depth is None or depth["depth"] is None:
        return UNTOLD, text
    half = depth["layers"] / 2
    if depth["high"] <= half:
        return REPRODUCES, f"{text} The interval ends at or below half of the layers ({half:g})."
    if depth["low"] > half:
        return FAILS, f"{text} The interval lies above half of the layers ({half:g})."
    return UNTOLD, f"{text} The interval reaches beyond half of the layers ({half:g})."


def _first_block(record: Record) -> tuple[str, str]:
    removal = record.get("removal")
    if removal is None:
        return UNTOLD, "First block: no visual tokens were removed."
    first, *later = [outcomes(run["correct"])[None] for run in removal["inside"]]
    if not later:
        return UNTOLD, "First block: the model has a single block, there is nothing to compare with."
    if max(paired_test(block, first, "greater") for block in later) < _ALPHA:
        return REPRODUCES, "First block: hiding the visual tokens there costs more than inside every later block."
    # One of several later blocks is enough here, so their smallest p-value is corrected.
    if min(paired_test(first, block, "greater") for block in later) * len(later) < _ALPHA:
        return FAILS, "First block: hiding the visual tokens inside a later block costs more."
    return UNTOLD, "First block: no significant difference from at least one later block."


def _agreement(record: Record) -> str:
    """How the other curves' depths stand to that of removal, which the rule is about."""
    measured = record.get("fusion") or {}
    others = [kind for kind in curves_of(record) if kind != "removal"]
    text = " ".join(f"Depth from {kind}: {depth_text(record, kind)}." for kind in others)
    found = {kind: measured.get(kind) for kind in ("removal", *others)}
    located = {kind: depth for kind, depth in found.items() if depth is not None and depth["depth"] is not None}
    if "removal" not in located or len(located) < 2:
        return text
    low, high = located["removal"]["low"], located["removal"]["high"]
    apart = [kind for kind, depth in located.items() if depth["low"] > high or depth["high"] < low]
    agree = [kind for kind in located if kind != "removal" and kind not in apart]
    parts = [f"{_listed(agree)} agree{'s' * (len(agree) == 1)} with removal: the intervals overlap"] if agree else []
    if apart:
        parts.append(f"{_listed(apart)} disagree{'s' * (len(apart) == 1)} with it: the intervals do not overlap")
    sentence = "; ".join(parts)
    return f"{text} {sentence[0].upper()}{sentence[1:]}."


def _listed(names: list[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
