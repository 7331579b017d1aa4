"""Runs whose probes the claims about one model are tested on."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.report.run_groups import RunGroup


def probed_groups(groups: Sequence[RunGroup], part: str) -> list[RunGroup]:
    """Return the plain models that hold a part of a record: those of attention experiments if there are any.

    Plain means without a compressor and without pre-fusion, which would give text the image before the first layer.

    Args:
        groups: All runs of a results folder.
        part: Name of the part, such as "removal".

    Returns:
        The groups; every finished record of a group holds the part.
    """
    plain = [
        group
        for group in groups
        if group.is_baseline and group.finished and all(record.get(part) is not None for record in group.finished)
    ]
    return [group for group in plain if group.is_attention_experiment] or plain
