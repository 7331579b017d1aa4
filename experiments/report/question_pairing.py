"""Whether two run groups were asked the same questions in the same order, so that these can be paired by index."""

from __future__ import annotations

from experiments.records.views import Record
from experiments.report.run_groups import RunGroup

PAIRING_NOTE = (
    "The rows were evaluated on different data. Question n of one row is taken for question n of another, unless question "
    "types, text-only guesses or right answers in the records contradict it; such rows are not compared."
)


def may_be_paired(first: RunGroup, second: RunGroup) -> bool:
    """Return whether question n of one group is question n of the other, as far as their records tell.

    Groups of the same data have the same questions. Groups of other data may: a video has the same questions at another
    number of frames.

    Args:
        first: A group with a finished record.
        second: Another one.
    """
    if first.examples != second.examples:
        return False
    if first.fingerprint == second.fingerprint:
        return True
    return not any(_contradict(a, b) for a in first.finished for b in second.finished)


def _contradict(record: Record, other: Record) -> bool:
    """Return whether two records cannot be of the same questions."""
    data, others = record["data"], other["data"]
    if data["kinds"] != others["kinds"]:
        return True
    guesses = [data.get("guess"), others.get("guess")]
    # The guess depends on the training split too, which data.path names.
    paths = [(r["config"].get("data") or {}).get("path") for r in (record, other)]
    if paths[0] == paths[1] and None not in guesses and guesses[0] != guesses[1]:
        return True
    # An answer that counts as right is the question's own, so two right answers to one question are equal.
    right = zip(record["accuracy"]["image"], other["accuracy"]["image"], strict=True)
    answers = zip(right, record.get("answers") or (), other.get("answers") or (), strict=False)
    return any(outcomes == ("1", "1") and a.strip() != b.strip() for outcomes, a, b in answers)
