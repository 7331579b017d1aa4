"""The right answer of a benchmark's document that analyses by layer read."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def analysed_answer(task: str, entry: Mapping[str, Any], options: Sequence[str] = ()) -> str:
    """Return the right answer of a document, as the model writes it if its own answer is that one.

    Of several right answers the most frequent counts, and the first of equally frequent ones. Tasks ignore case, and spaces and
    punctuation at both ends. So if the model's own answer differs from the right one in these alone, it is returned.

    Args:
        task: The task.
        entry: What lmms-eval logs of the document.
        options: The answers that the model scored, in order; empty for a task that generates one.

    Raises:
        ValueError: If the document has no right answer that is a text.

    Example:
        >>> entry = {"doc_id": 3, "doc": {"answer": "yes"}, "target": "yes", "filtered_resps": ["Yes."]}
        >>> analysed_answer("gqa", entry)
        'Yes.'
        >>> analysed_answer("gqa", entry | {"filtered_resps": ["No."]})
        'yes'
    """
    texts = [text.strip() for text in _right_answers(task, entry, options) if isinstance(text, str) and text.strip()]
    if not texts:
        raise ValueError(
            f"task {task}, document {entry['doc_id']}: probe.* need a right answer that is a text, found "
            f"{entry['target']!r:.40}; leave out the probes"
        )
    right = Counter(texts).most_common(1)[0][0]
    own = entry["filtered_resps"][0]
    return own.strip() if isinstance(own, str) and own.strip() and _plain(own) == _plain(right) else right


def _right_answers(task: str, entry: Mapping[str, Any], options: Sequence[str]) -> Sequence[Any]:
    document, target = entry["doc"], entry["target"]
    annotators = document.get("answers")
    if annotators and isinstance(annotators, list):
        # VQAv2, VizWiz and TextVQA: their task files name a column `answer` that the data lack, so the target is that word.
        return [answer["answer"] if isinstance(answer, Mapping) else answer for answer in annotators]
    if options and target not in [option.strip() for option in options] and str(target).isdigit():
        return [options[int(target)]]  # the number of an option, unless the options are numbers themselves
    # The prompts of these tasks ask for a letter, and their targets are the text or the number of the option.
    if task.startswith("mvbench") and target in document.get("candidates", ()):
        return [string.ascii_uppercase[document["candidates"].index(target)]]
    if task.startswith("egoschema") and str(target).isdigit():
        return [string.ascii_uppercase[int(target)]]
    if isinstance(target, Sequence) and not isinstance(target, str):
        return target
    return [str(target) if isinstance(target, int) else target]


def _plain(text: str) -> str:
    return text.strip(string.whitespace + string.punctuation).casefold()
