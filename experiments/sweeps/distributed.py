"""TODO"""

from __future__ import annotations

import os

from experiments.sweeps.store import Standing


def first() -> bool:
    """Whether this is the only process or, of several that torchrun launched, the first."""
    return os.environ.get("RANK", "0") == "0"


def together() -> bool:
    """Whether several processes, launched by torchrun, train one cell together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _as_the_first(settled: Standing | None, device: str) -> Standing | None:
    """What the first of several processes has decided."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from experiments.devices import choose_device

    PartialState(cpu=choose_device(device).type == "cpu")
    said = [settled]
    broadcast_object_list(said)
    return said[0]
