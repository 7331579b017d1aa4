"""Answer for commands that have a new name."""

from __future__ import annotations

import sys
from typing import NoReturn


def exit_with_new_name(module: str) -> NoReturn:
    """Print the new command to stderr in one line, and exit with status 2.

    Args:
        module: The module that now holds the command.
    """
    print(f"error: this command has moved; run `python -m {module}` instead", file=sys.stderr)
    sys.exit(2)
