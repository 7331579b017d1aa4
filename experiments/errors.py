"""TODO"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException


def _launcher_hint(error: str) -> str:
    """A hint to add to Hydra's words where it does not find a launcher."""
    wanted = "Could not" in error and "hydra/launcher" in error
    return "; joblib, submitit_local and submitit_slurm come with pip install '.[sweep]'" if wanted else ""


FULL_ERROR = "HYDRA_FULL_ERROR"


_full_error_wanted = os.environ.get(FULL_ERROR) == "1"


EXPECTED = (HydraException, OmegaConfBaseException, ValueError, OSError, ImportError)  # what wrong input ends in


def stop(error: BaseException | str) -> NoReturn:
    """End with one line, or with the whole stack where HYDRA_FULL_ERROR=1 asks for it."""
    if _full_error_wanted and isinstance(error, BaseException):
        raise error
    print(f"error: {one_line(error)}", file=sys.stderr)
    sys.exit(1)


def one_line(error: BaseException | str) -> str:
    """What is wrong, without the parts of Hydra's messages that repeat it."""
    causes = (error, error.__cause__) if isinstance(error, HydraException) else (error,)
    text = " ".join(str(cause).split("\nfull_key")[0] for cause in causes if cause is not None)
    return " ".join((text + _launcher_hint(text)).split())
