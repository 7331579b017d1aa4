"""Numbers, and the name of accuracy, as readers see them in tables and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from experiments.report.statistics import Interval

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
NONE = "\u2013"
"""Text of a table cell where nothing applies: an en dash. A missing entry reads "failed" or "not run" instead."""

EXACT_MATCH = "teacher-forced exact match"
"""The metric that reports call accuracy."""
ACCURACY_DEFINITION = (
    f"Accuracy is {EXACT_MATCH}: every token of the right answer and its end is the model's most likely one, given the "
    "tokens before it."
)


def unit(value: float, units: Sequence[tuple[float, str]] = UNITS) -> tuple[float, str]:
    """Return the largest unit in which `value` is at least 1: (1e9, "G") for 2.5e9."""
    return next((pair for pair in units if value >= pair[0]), units[-1])


def setting_text(key: str, value: object) -> str:
    """Return a setting as one types it on the command line.

    Example:
        >>> setting_text("data.parts", ["2x2", "one"])
        'data.parts=[2x2,one]'
    """
    return f"{key}={setting_value(value)}"


def setting_value(value: object) -> str:
    """Return the value of a setting as one types it on the command line."""
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def format_interval(interval: Interval, sign: bool = False) -> str:
    """Format a mean and its bounds (fractions) as percent: "83.1 [81.0, 85.2]"."""
    mean, low, high = (format_signed(100 * value, sign) for value in interval)
    return f"{mean} [{low}, {high}]"


def format_p_value(p_value: float) -> str:
    """Format a p-value with three decimals, or as "< 0.001"."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def format_quantity(value: float) -> str:
    """Format a count with three significant digits and a unit prefix: "1.79 M". NaN reads "not counted"."""
    if math.isnan(value):
        return "not counted"
    scale, prefix = unit(value)
    return f"{value / scale:#.3g}".rstrip(".") + (f" {prefix}" if prefix else "")


def format_signed(value: float, sign: bool = True) -> str:
    """Format a number with one decimal, a true minus sign and never "-0.0"; `sign` adds a plus sign."""
    rounded = round(value, 1) + 0.0
    return f"{rounded:+.1f}".replace("-", "\u2212") if sign else f"{rounded:.1f}"


def format_milliseconds(seconds: float) -> str:
    """Format a time in seconds as milliseconds with one decimal. NaN reads "not timed"."""
    return "not timed" if math.isnan(seconds) else f"{1000 * seconds:,.1f}"
