"""Bootstrap resamples of a curve over its samples."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

# Draw counts held at once (32 MiB in float64).
DRAW_COUNTS_PER_CHUNK = 2**22


def require_bootstrap(level: float, resamples: int) -> None:
    """Check the level and the number of resamples of a bootstrap interval.

    Raises:
        ValueError: The level is not between 0 and 1, or the resamples are no whole number of at least 1.

    Example:
        >>> require_bootstrap(level=0.95, resamples=2000)
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: it must be above 0 and below 1, as 0.95")
    if not isinstance(resamples, int | np.integer) or resamples < 1:
        raise ValueError(f"resamples is {resamples!r}: it must be a whole number of at least 1")


def resampled_means(
    values: Float[np.ndarray, "points samples"], resamples: int, seed: int
) -> tuple[Float[np.ndarray, "resamples points"], Float[np.ndarray, "resamples points"]]:
    """Return means over the samples that each resample drew, with replacement, and over those it left out.

    Args:
        values: A value for each point and sample. A resample keeps all points of a sample together.
        resamples: Number of resamples.
        seed: Seed of the draws.

    Returns:
        The two means of each resample at each point. The second is NaN for a resample that drew every sample.

    Example:
        >>> import numpy as np
        >>> drawn, left_out = resampled_means(np.eye(3), resamples=100, seed=0)
        >>> drawn.shape
        (100, 3)
    """
    drawn, left_out = [], []
    for counts in _draw_counts(values.shape[1], resamples, seed):
        drawn.append(counts @ values.T / values.shape[1])
        not_drawn = (counts == 0).astype(float)
        with np.errstate(invalid="ignore"):
            left_out.append(not_drawn @ values.T / not_drawn.sum(axis=1, keepdims=True))
    return np.concatenate(drawn), np.concatenate(left_out)


def _draw_counts(samples: int, resamples: int, seed: int) -> Iterator[Int[np.ndarray, "chunk samples"]]:
    """Yield how often each resample drew each sample, in chunks of resamples."""
    generator = np.random.default_rng(seed)
    chunk = max(DRAW_COUNTS_PER_CHUNK // samples, 1)
    equal = np.full(samples, 1 / samples)
    for start in range(0, resamples, chunk):
        yield generator.multinomial(samples, equal, size=min(chunk, resamples - start))
