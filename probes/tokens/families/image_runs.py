"""Runs of consecutive image tokens, and the text between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch


class TokenRun(NamedTuple):
    """Consecutive image tokens of one row, at positions `start` to `stop - 1`."""

    row: int
    start: int
    stop: int


def find_image_runs(inputs: Mapping[str, Any], image_token: int) -> list[TokenRun]:
    """Return the maximal runs of attended image tokens in reading order.

    Args:
        inputs: Inputs of the model call.
        image_token: Token id that stands for a visual token.
    """
    vision = inputs["input_ids"] == image_token
    if inputs.get("attention_mask") is not None:
        vision = vision & (inputs["attention_mask"] != 0)
    change = torch.nn.functional.pad(vision.int(), (1, 1)).diff()
    starts, stops = (change == 1).nonzero().tolist(), (change == -1).nonzero().tolist()
    return [TokenRun(row, start, stop) for (row, start), (_, stop) in zip(starts, stops, strict=True)]


def texts_before_runs(inputs: Mapping[str, Any], runs: Sequence[TokenRun], processor: Any) -> list[str]:
    """Return the text between each run and the previous run of its row.

    Args:
        inputs: Inputs of the model call.
        runs: Runs of image tokens in reading order.
        processor: Processor whose tokenizer decodes the text, or None.

    Returns:
        One text per run: "" for the first run of a row, and for all runs without a processor.
    """
    texts = [""] * len(runs)
    for index, (previous, run) in enumerate(pairwise(runs), start=1):
        if processor is not None and previous.row == run.row:
            texts[index] = processor.tokenizer.decode(inputs["input_ids"][run.row, previous.stop : run.start])
    return texts
