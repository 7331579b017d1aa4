"""What goes wrong with Hydra's launchers for sweeps, joblib and submitit, in one line each."""

from __future__ import annotations

import traceback

_PACKAGES = ("joblib", "submitit")
_LOG = "\nError stream produced"  # submitit appends the whole log of a job that is gone


def lost(error: Exception) -> str | None:
    """What a launcher says of jobs that it could not start, or that ended without a word. None where the error is not
    a launcher's."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if frame.f_globals["__name__"].split(".")[0] not in _PACKAGES:
        return None
    said, log, _ = str(error).partition(_LOG)
    return said + "; its log lies there too, and the same command takes up what is missing" if log else said


def missing(error: str) -> str:
    """A hint to add to Hydra's words where it does not find a launcher."""
    wanted = "Could not" in error and "hydra/launcher" in error
    return "; joblib, submitit_local and submitit_slurm come with pip install '.[sweep]'" if wanted else ""
