"""Several conversation files as one training split, each with a share."""

from __future__ import annotations

import random
from collections.abc import Sequence


def draw_entries(sizes: Sequence[int], shares: Sequence[float], seed: int) -> list[tuple[int, int]]:
    """Draw entries of several files, each as often as its file's share says.

    A share of 0.5 draws half of the entries, and 2 takes each entry twice. 2.5 takes each twice and draws half of them
    once more. The entries of several files are shuffled together, so that any number of first ones has the same mixture.
    One file keeps its order.

    Args:
        sizes: The number of entries of each file.
        shares: The share of each file.
        seed: Seed of the draw and of the order.

    Returns:
        The number of the file and of the entry, both counted from 0, for each entry that is drawn.

    Example:
        >>> draw_entries([2], [2.0], seed=0)
        [(0, 0), (0, 1), (0, 0), (0, 1)]
        >>> sorted(draw_entries([3, 2], [1.0, 0.5], seed=0))[:3]
        [(0, 0), (0, 1), (0, 2)]
    """
    drawn: list[tuple[int, int]] = []
    for file, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        whole, rest = divmod(share, 1)
        once_more = random.Random(f"{seed} {file}").sample(range(size), round(rest * size))
        drawn += [(file, entry) for entry in [*list(range(size)) * int(whole), *sorted(once_more)]]
    if len(sizes) > 1:
        random.Random(seed).shuffle(drawn)
    return drawn
