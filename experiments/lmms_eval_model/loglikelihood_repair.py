"""A repair of lmms-eval 0.7.0 to 0.7.3, whose evaluator turns the scores of given answers into text."""

from __future__ import annotations

from typing import Any


def repair_loglikelihood() -> bool:
    """Make lmms-eval's evaluator keep the pairs (loss, is greedy) that `loglikelihood` returns.

    `unwrap_generation_output` makes a text of every output that is neither a text nor a list of texts, and each
    multiple-choice task then fails. It is replaced only if a pair shows the fault.

    Returns:
        Whether the evaluator was repaired. A second call finds nothing to repair.
    """
    from lmms_eval import evaluator

    unwrap = evaluator.unwrap_generation_output
    pair = (0.5, True)
    if unwrap(pair)[0] == pair:
        return False

    def unwrap_output(output: Any) -> Any:
        is_pair = isinstance(output, tuple) and len(output) == 2 and isinstance(output[0], float)
        return (output, None) if is_pair else unwrap(output)

    evaluator.unwrap_generation_output = unwrap_output
    return True
