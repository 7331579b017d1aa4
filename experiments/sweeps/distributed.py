"""Several processes that train one cell together, as torchrun launches them."""

from __future__ import annotations

import os

from experiments.sweeps.store import CellStatus


def is_main_process() -> bool:
    """Return whether this is the only process, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def is_distributed() -> bool:
    """Return whether several processes train one cell together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def broadcast_status(status: CellStatus | None, device: str) -> CellStatus | None:
    """Return in every process what the main process passed.

    Args:
        status: The status of the cell in the main process; ignored in the others.
        device: The setting `device`, which decides how the processes communicate.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from experiments.devices import select_device

    PartialState(cpu=select_device(device).type == "cpu")
    shared = [status]
    broadcast_object_list(shared)
    return shared[0]
