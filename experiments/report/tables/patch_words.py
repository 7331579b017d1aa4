"""Patch-words table: how many patches of generated scenes the logit lens and the contextual lens name right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from experiments.records.views import Record, record_label
from experiments.report.formatting import format_interval
from experiments.report.statistics import TAILS, Interval, crossed_draws
from experiments.report.tables.table import Table, data_frame, interval_columns

_COLUMNS = (
    *("model", "depth", "patches", "logit", "logit_low", "logit_high", "logit_chance"),
    *("contextual", "contextual_low", "contextual_high", "contextual_chance"),
    *("difference", "difference_low", "difference_high"),
)


def patch_words_tables(records: Sequence[Record]) -> tuple[Table, ...]:
    """Build the table of the shares that each lens names right, after each number of layers.

    Args:
        records: Finished records.

    Returns:
        The table alone, or nothing if no record has words of patches.
    """
    data, text = [], []
    for record in records:
        part = record.get("patch_words")
        if part is None:
            continue
        patches = np.array(part["patches"], dtype=float)
        for depth, entry in enumerate(part["depths"]):
            logit, contextual = (np.array(entry[lens]["right"], dtype=float) for lens in ("logit", "contextual"))
            intervals = {
                "logit": share_of_patches(logit, patches),
                "contextual": share_of_patches(contextual, patches),
                "difference": share_of_patches(contextual - logit, patches),
            }
            chances = {lens: entry[lens]["chance"] for lens in ("logit", "contextual")}
            row = {"model": record["name"], "depth": depth, "patches": int(patches.sum())}
            for name, interval in intervals.items():
                row |= interval_columns(name, interval)
            data.append(row | {f"{lens}_chance": chance for lens, chance in chances.items()})
            text.append(
                {
                    "Model": record_label(record),
                    "After layer": str(depth),
                    "Patches": f"{row['patches']:,}",
                    "Logit lens (%)": format_interval(intervals["logit"]),
                    "Chance (%)": f"{100 * chances['logit']:.1f}",
                    "Contextual lens (%)": format_interval(intervals["contextual"]),
                    "Its chance (%)": f"{100 * chances['contextual']:.1f}",
                    "Difference": format_interval(intervals["difference"], sign=True),
                }
            )
    if not data:
        return ()
    notes = (
        "Share of the patches on an object whose nearest word is the object's colour or shape. Logit lens: the word that the "
        "head predicts from the patch's state. Contextual lens: the word of a text corpus with the most similar state. "
        "Chance: the share if the same words were dealt to the patches at random. 95% bootstrap intervals over images, "
        "paired for the difference (contextual minus logit, percentage points).",
    )
    text_frame = pd.DataFrame(text)
    numeric = tuple(column for column in text_frame.columns if column != "Model")
    return (
        Table("patch_words", "Words of patches by two lenses.", data_frame(data, _COLUMNS), text_frame, numeric, notes),
    )


def share_of_patches(right: Float[np.ndarray, " images"], patches: Float[np.ndarray, " images"]) -> Interval:
    """Return the sum of `right` over the sum of `patches`, with a 95% bootstrap interval over images.

    Args:
        right: Patches named right in each image, or differences of such numbers.
        patches: Patches in each image.

    Example:
        >>> share_of_patches(np.ones(3), np.full(3, 2.0))
        Interval(mean=0.5, low=0.5, high=0.5)
    """
    numerator, denominator = crossed_draws(np.stack([right, patches])[:, None])
    shares = numerator[denominator > 0] / denominator[denominator > 0]
    return Interval(float(right.sum() / patches.sum()), *map(float, np.quantile(shares, TAILS)))
