"""Ratios with their noise, and which of them moved."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.markdown import markdown_table


@dataclass(frozen=True)
class Ratio:
    """A ratio over rounds of turns.

    Args:
        ratio: The median of the ratios of single rounds.
        noise: The distance between the quartiles of these.
        rounds: Number of rounds.
    """

    ratio: float
    noise: float
    rounds: int

    @classmethod
    def of(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
        """Return the ratio of times that were measured in the same rounds.

        Example:
            >>> Ratio.of([1.0, 2.0, 6.0], [2.0, 2.0, 4.0])
            Ratio(ratio=1.0, noise=0.5, rounds=3)
        """
        single = [a / b for a, b in zip(numerators, denominators, strict=True)]
        quartiles = statistics.quantiles(single, n=4, method="inclusive") if len(single) > 1 else single * 3
        return cls(round(quartiles[1], 4), round(quartiles[2] - quartiles[0], 4), len(single))


def movement(committed: Ratio, now: Ratio) -> str:
    """Return "slower", "faster", or "" if the difference is within the noise of both.

    Example:
        >>> movement(Ratio(0.80, 0.02, 7), Ratio(0.85, 0.02, 7)), movement(Ratio(0.80, 0.02, 7), Ratio(0.83, 0.02, 7))
        ('slower', '')
    """
    if abs(now.ratio - committed.ratio) <= committed.noise + now.noise:
        return ""
    return "slower" if now.ratio > committed.ratio else "faster"


def read_ratios(record: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], Ratio]:
    """Return the ratios of a record, by measurement and name."""
    return {
        (group, name): Ratio(**values)
        for group, measured in record.items()
        for name, values in measured["ratios"].items()
    }


def comparison_table(committed: Mapping[tuple[str, str], Ratio], now: Mapping[tuple[str, str], Ratio]) -> str:
    """Return a Markdown table of all ratios: committed, now, and which way one moved by more than its noise."""
    columns = ["measured", "ratio", "committed", "now", "moved"]
    return markdown_table(columns, _comparison_rows(committed, now), ("committed", "now"))


def _comparison_rows(
    committed: Mapping[tuple[str, str], Ratio], now: Mapping[tuple[str, str], Ratio]
) -> Iterator[list[str]]:
    for key in dict.fromkeys((*committed, *now)):
        old, new = committed.get(key), now.get(key)
        moved = movement(old, new) if old and new else "new" if new else "not measured"
        yield [*key, *(f"{ratio.ratio:.3f} ± {ratio.noise:.3f}" if ratio else "" for ratio in (old, new)), moved]
