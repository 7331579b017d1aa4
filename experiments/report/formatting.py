"""Numbers as people read them in tables and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from experiments.report.statistics import Interval

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
NONE = "\u2013"
"""What a cell shows where nothing applies: an en dash. A hole says "failed" instead."""


def unit(value: float, units: Sequence[tuple[float, str]] = UNITS) -> tuple[float, str]:
    """The largest unit in which `value` is at least 1: (1e9, "G") for 2.5e9."""
    return next((pair for pair in units if value >= pair[0]), units[-1])


def percent(interval: Interval, sign: bool = False) -> str:
    """Three fractions as "83.1 [81.0, 85.2]" in percent."""
    mean, low, high = (signed(100 * value, sign) for value in interval)
    return f"{mean} [{low}, {high}]"


def p_text(p_value: float) -> str:
    """A p-value to two significant places, "< 0.001" below that."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def quantity(value: float) -> str:
    """A count with three significant digits and a unit prefix: "1.79 M"."""
    if math.isnan(value):
        return "not counted"
    scale, prefix = unit(value)
    return f"{value / scale:#.3g}".rstrip(".") + (f" {prefix}" if prefix else "")


def signed(value: float, sign: bool = True) -> str:
    """One decimal, with a true minus sign and no "-0.0"."""
    rounded = round(value, 1) + 0.0
    return f"{rounded:+.1f}".replace("-", "\u2212") if sign else f"{rounded:.1f}"


def milliseconds(seconds: float) -> str:
    """A time to a tenth of a millisecond, "not timed" for NaN."""
    return "not timed" if math.isnan(seconds) else f"{1000 * seconds:,.1f}"
